"""What was decided for a call is remembered for every call that looks like it.

Whether arguments are good, which backend serves them, tiles and grid of a launch: all of it follows from what a call
looks like (shapes, strides, dtypes, devices, numbers) and never from the values its tensors hold. So it is decided
once, by a function marked `remembered`; a call that looks like an earlier one costs a look-up and the launch.

A public function remembers its checks and the chosen backend, and hands `doors` on to `vkernels.library.op`, which
remembers there what runs each operator. An operator's Triton launcher is written as `planned`: it checks, plans, and
returns what launches. Refusals are never remembered, and nothing remembered holds a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from vkernels import library

Decided = TypeVar("Decided")
VALUES = {bool, int, torch.dtype, torch.device, torch.Size}
MOST = 4096  # decisions kept; one more and all are made anew
_known: dict[tuple[Any, ...], Any] = {}


class Unlike(TypeError):
    """A call that is like no other: a tensor that is more than memory, or an object that may change."""


class Form:
    """What several values look like, hashed once: for what lives longer than a call."""

    __slots__ = ("hash", "key")

    def __init__(self, *values: Any):
        self.key = tuple(look(values))
        self.hash = hash(self.key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Form) and self.key == other.key)


def look(values: Iterable[Any]) -> list[Any]:
    """What `values` look like, in a list no other looks share. Types count: 1, 1.0 and True are equal and not alike."""
    seen: list[Any] = []
    for x in values:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            seen += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_neg())
        elif x is None or kind is str or kind is Form:
            seen.append(x)
        elif kind is list or kind is tuple:
            seen += (kind, len(x))
            seen += look(x)
        elif kind is float:
            seen += (kind, x or str(x))  # 0.0 and -0.0 are equal, too
        elif kind in VALUES or _is_value(kind):
            seen += (kind, x)
        else:
            raise Unlike
    return seen


def _is_value(kind: Any) -> bool:
    """Frozen dataclasses that are equal when their fields are: RopeSpec, Grid, Pattern."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen and parameters.eq


def remembered(decide: Callable[..., Decided]) -> Callable[..., Decided]:
    """`decide(*args, **rest)`, called once for all `args` that look alike. `rest` are arguments whose part in the
    decision `args` already tell. NotImplemented among `args`, which looks like nothing, says that they do not yet.

    `decide` may read of a tensor what `look` does, of other objects what never changes, and of the world only what is
    in the key below. It returns no tensor and keeps none.
    """

    @wraps(decide)
    def recall(*args: Any, **rest: Any) -> Decided:
        if torch.compiler.is_compiling():
            return decide(*args, **rest)
        try:
            key = (decide, torch.is_grad_enabled(), library.recording_for, library.emulator, *look(args))
            known = _known.get(key)
        except (TypeError, AttributeError):  # AttributeError: tensors whose sizes are symbols
            return decide(*args, **rest)
        if known is None:
            known = decide(*args, **rest)
            if len(_known) >= MOST:
                _known.clear()
            _known[key] = known
        return known

    return recall


def planned(plan: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """An operator's implementation, from `plan(*args)`: it checks and returns the function that runs on such args."""
    decide = remembered(plan)

    @wraps(plan)
    def function(*args: Any) -> Any:
        return decide(*args)(*args)

    function.plan = decide  # type: ignore[attr-defined]
    return function


def forget() -> None:
    """Decide everything anew: for who changes what decisions rest on (tile tables, what this machine can do)."""
    _known.clear()
