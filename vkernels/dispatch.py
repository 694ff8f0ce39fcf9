"""Which backend runs a call: the first that can, or exactly the one that was asked for.

An op's `api.py` gathers its arguments into a small `Call` value and lists its `Backend`s in order of preference. A
backend says in a sentence why it cannot run a call; the same sentence refuses the user and skips the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vkernels.check import NoBackend, refusal


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: `why_not(call)` is None when `run(call)` may be called."""

    name: str
    why_not: Callable[[Any], str | None]
    run: Callable[[Any], Any]


def choose(op: str, backends: Sequence[Backend], name: str | None, call: Any) -> Backend:
    """The backend called `name`, or with None the first that can run `call`. Never a silent fallback."""
    if name is None:
        for backend in backends:
            if backend.why_not(call) is None:
                return backend
        raise NoBackend(f"{op}: no backend can run this call\n{reasons(backends, call)}")
    for backend in backends:
        if backend.name == name:
            reason = backend.why_not(call)
            if reason is not None:
                raise NoBackend(f"{op}: backend {name} cannot run this call: {reason}")
            return backend
    raise ValueError(refusal(op, "backend", f"be one of {', '.join(b.name for b in backends)}", repr(name)))


def reasons(backends: Sequence[Backend], call: Any) -> str:
    return "\n".join(f"  {b.name}: {b.why_not(call) or 'can run it'}" for b in backends)
