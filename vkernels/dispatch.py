"""Which backend runs a call: the first that can, or exactly the one that was asked for.

An op's `api.py` gathers its arguments into a small `Call` value and lists its `Backend`s in order of preference. A
backend says in a sentence why it cannot run a call; the same sentence refuses the user and skips the test.

Where `make gpu` has timed several backends on calls of one kind, the faster goes first: `preferences.json` holds
{chip: {op: {kind: {backend: time over the fastest's}}}}. What was not measured keeps its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vkernels import library
from vkernels.check import NoBackend, refusal
from vkernels.library import capability

PREFERENCES = Path(__file__).with_name("preferences.json")
measured: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(PREFERENCES.read_text())


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: `why_not(call)` is None when `run(call)` may be called.

    `kind(call)`, given by one backend for all of an op, is where a call runs and with which calls it is compared.
    """

    name: str
    why_not: Callable[[Any], str | None]
    run: Callable[[Any], Any]
    kind: Callable[[Any], tuple[torch.device, str]] | None = None


def like(x: torch.Tensor) -> tuple[torch.device, str]:
    """The kind of a call whose time its dtype and row length decide."""
    d = x.shape[-1]
    return x.device, f"{str(x.dtype).removeprefix('torch.')}, d <= {next((n for n in (64, 128, 256) if d <= n), 'any')}"


def chip(device: torch.device) -> str:
    if library.recording_for is not None:
        return library.recording_for
    return "sm{}{}".format(*capability(device)) if device.type == "cuda" else device.type


def times(op: str, backends: Sequence[Backend], call: Any) -> tuple[str, dict[str, float]]:
    """The kind of a call, and what is measured of it: backend -> time over the fastest's."""
    kind = next((b.kind for b in backends if b.kind is not None), None)
    if kind is None:
        return "", {}
    device, name = kind(call)
    return f"{chip(device)}, {name}", measured.get(chip(device), {}).get(op, {}).get(name, {})


def ranked(op: str, backends: Sequence[Backend], call: Any) -> list[Backend]:
    """The order in which backends are tried: those measured take one another's places, the faster first."""
    if not measured:
        return list(backends)
    taken = times(op, backends, call)[1]
    faster = iter(sorted((b for b in backends if b.name in taken), key=lambda b: taken[b.name]))
    return [next(faster) if b.name in taken else b for b in backends]


def choose(op: str, backends: Sequence[Backend], name: str | None, call: Any) -> Backend:
    """The backend called `name`, or with None the first that can run `call`. Never a silent fallback."""
    if name is None:
        for backend in ranked(op, backends, call):
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
