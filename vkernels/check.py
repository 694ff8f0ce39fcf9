"""Refusals: what every public function says when it is given something it cannot use.

One sentence, one form: ``{op}: {argument} must {rule}, got {value}``. `bind` reads shapes in the axis letters of the
docstrings (``"b s n d"``) and returns the sizes it learned.
"""

from __future__ import annotations

from typing import Any

import torch


class ShapeError(ValueError):
    """A tensor's rank or size breaks the shape the docstring states."""


class NoBackend(NotImplementedError):
    """No backend, or not the one asked for, can run this call; the message holds every reason."""


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refusal(op: str, argument: str, rule: str, value: Any, hint: str = "") -> str:
    return f"{op}: {argument} must {rule}, got {value}" + (f"; {hint}" if hint else "")


def require(
    condition: bool, op: str, argument: str, rule: str, value: Any, error: type[Exception] = ValueError
) -> None:
    if not condition:
        raise error(refusal(op, argument, rule, value))


_parsed: dict[str, tuple[tuple[str | int, bool], ...]] = {}


def _parse(shape: str) -> tuple[tuple[str | int, bool], ...]:
    """Each axis as (name or size, may it be 1 instead)."""
    if shape not in _parsed:
        axes: list[tuple[str | int, bool]] = []
        for word in shape.split():
            name, _, alternative = word.partition("|")
            axes.append((int(name) if name.isdigit() else name, alternative == "1"))
        _parsed[shape] = tuple(axes)
    return _parsed[shape]


def bind(op: str, *tensors: tuple[str, torch.Tensor | None, str]) -> dict[str, int]:
    """Axis sizes of `(argument, tensor, shape)` triples, or a ShapeError that names the first contradiction.

    A shape is axis letters and literal sizes separated by spaces; ``b|1`` accepts 1 in place of ``b``. None is skipped.
    All tensors must be on one device.
    """
    sizes: dict[str, int] = {}
    first: tuple[str, torch.Tensor] | None = None
    for argument, tensor, shape in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(refusal(op, argument, "be a tensor", type(tensor).__name__))
        axes = _parse(shape)
        if tensor.dim() != len(axes):
            raise ShapeError(_shape_refusal(op, argument, shape, tensor, sizes))
        for (axis, may_be_one), size in zip(axes, tensor.shape, strict=True):
            if isinstance(axis, int):
                expected = axis
            else:
                if may_be_one and size == 1:
                    continue
                expected = sizes.setdefault(axis, size)
            if size != expected:
                raise ShapeError(_shape_refusal(op, argument, shape, tensor, sizes))
        if first is None:
            first = (argument, tensor)
        elif tensor.device != first[1].device:
            raise TypeError(refusal(op, argument, f"be on the device of {first[0]} ({first[1].device})", tensor.device))
    return sizes


def _shape_refusal(op: str, argument: str, shape: str, tensor: torch.Tensor, sizes: dict[str, int]) -> str:
    so_far = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    hint = f"axes so far: {so_far}" if so_far else ""
    return refusal(op, argument, f"have shape ({shape})", tuple(tensor.shape), hint)


def same_dtype(op: str, *tensors: tuple[str, torch.Tensor | None], allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    """All given tensors share one of the `allowed` dtypes (float64 is accepted where the reference may be asked)."""
    first: tuple[str, torch.Tensor] | None = None
    for argument, tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in allowed and tensor.dtype != torch.float64:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(refusal(op, argument, f"have dtype {names}", str(tensor.dtype).removeprefix("torch.")))
        if first is None:
            first = (argument, tensor)
        elif tensor.dtype != first[1].dtype:
            rule = f"have the dtype of {first[0]} ({str(first[1].dtype).removeprefix('torch.')})"
            raise TypeError(refusal(op, argument, rule, str(tensor.dtype).removeprefix("torch.")))
