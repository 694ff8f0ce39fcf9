"""Objects that torch.compile takes as constants of its graph.

Functions marked `torch.compiler.assume_constant_result` are called while torch.compile traces, and what they return is
part of the graph. They take numbers, strings and tuples of these, so what a mask or a deal means to them is told by its
name.
"""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_known: WeakValueDictionary[str, Any] = WeakValueDictionary()


class Named:
    """A value that never changes: VideoMask, MaskPlan, ShardPlan."""

    __slots__ = ()

    @torch.compiler.assume_constant_result
    def _name(self) -> str:
        name = f"{type(self).__name__} {id(self)}"
        _known[name] = self
        return name


def named(x: Any) -> Any:
    """`x`; while torch.compile traces, the name of a Named, and of an int its value: the graph then serves that object
    and no other."""
    if not torch.compiler.is_compiling():
        return x
    if isinstance(x, Named):
        id(x)  # traced, it becomes the guard that says so
        return x._name()
    return operator.index(x) if isinstance(x, int) else x


def meant(x: Any) -> Any:
    """What `named` was given."""
    return _known.get(x, x) if isinstance(x, str) else x


def look(x: Tensor) -> Any:
    """`x`; while torch.compile traces, all of it but its values: the graph then serves these sizes and no others."""
    if not torch.compiler.is_compiling():
        return x
    return tuple([operator.index(size) for size in x.shape]), x.dtype, x.device


def like(x: Any) -> Tensor:
    """A tensor that looks like the one `look` was given."""
    if isinstance(x, Tensor):
        return x
    shape, dtype, device = x
    return torch.empty((), dtype=dtype, device=device).expand(shape)
