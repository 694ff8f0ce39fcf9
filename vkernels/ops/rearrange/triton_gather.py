"""Rows of up to four sources, gathered and reduced in registers: what the forward and the backward of rearrange share.

A source is a tuple (address, first row number, n1, n2, strides of b, n0, n1, n2): its rows lie on up to three axes
n0 x n1 x n2, and n1, n2 are None where one axis does. A plan is a tuple (ptr, idx, weight, their strides over samples,
taps, rows of all sources). Strides of elements come divided by ALIGN. Every row number is checked before it is used:
one that names no row reads as 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import ShapeError, bind, refusal, require
from vkernels.library import unit_stride
from vkernels.ops.rearrange.torch_op import SOURCES, batch, row_axes
from vkernels.triton.launch import alignment

OP = "rearrange"
SOURCE_SIZES = [f"x{i}_{field}" for i in range(SOURCES) for field in ("first", "n1", "n2", "b", "s0", "s1", "s2")]
INDICES = ["ptr_ptr", "idx_ptr", "weight_ptr", "rows_ptr"]  # read one by one; a source's part of a plan starts anywhere
PLAN_SIZES = ["stride_ptr", "stride_idx", "stride_weight", "taps", "n_rows"]


@triton.jit
def _row_offset(source, row, sample, ALIGN: tl.constexpr):
    """Elements from the start of a source to its row `row`, counted over all sources."""
    row -= source[1]
    at = sample * (source[4] * ALIGN)
    if source[3] is not None:
        at += row % source[3] * (source[7] * ALIGN)
        row = row // source[3]
    if source[2] is not None:
        at += row % source[2] * (source[6] * ALIGN)
        row = row // source[2]
    return at + row * (source[5] * ALIGN)


@triton.jit
def load_rows(sources, row, sample, live, n_rows, column, COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):
    """[rows, columns] of the rows that exist and are `live`, else 0.

    All rows are addressed from the first source. A choice hides from Triton that what is chosen is a multiple of ALIGN,
    so it is told.
    """
    size: tl.constexpr = sources[0][0].dtype.element_ty.primitive_bitwidth // 8
    live = live & (row >= 0) & (row < n_rows)
    row = row.to(tl.int64)
    at = _row_offset(sources[0], row, sample, ALIGN)
    for i in tl.static_range(1, COUNT):
        apart = (sources[i][0].to(tl.int64) - sources[0][0].to(tl.int64)) // size
        there = apart + _row_offset(sources[i], row, sample, ALIGN)
        at = tl.multiple_of(tl.where(row >= sources[i][1], there, at), ALIGN)
    return tl.load(sources[0][0] + at[:, None] + column[None, :], mask=live[:, None] & (column < C)[None, :], other=0)


@triton.jit
def move_taps(sources, plan, sample, row, live, column, COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):
    """One input row, or 0, per output row, in its own dtype."""
    tap = tl.load(plan[1] + sample * plan[4] + row, mask=live, other=-1)
    return load_rows(sources, tap, sample, live, plan[7], column, COUNT, C, ALIGN)


@triton.jit
def tap_range(plan, sample, row, live):
    """First and last tap of every row, inside the taps there are whatever `ptr` holds."""
    at = plan[0] + sample * plan[3] + row
    first = tl.minimum(tl.maximum(tl.load(at, mask=live, other=0), 0), plan[6])
    last = tl.minimum(tl.load(at + 1, mask=live, other=0), plan[6])
    return first, tl.maximum(first, last)


@triton.jit
def reduce_taps(
    sources, plan, sample, row, live, column,
    COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, MAX: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Sum (or maximum) of the weighted taps of every row, float32, in the order of the plan.

    TAPS loads are under way at a time. A row without taps is 0.
    """
    if plan[0] is None:
        v = move_taps(sources, plan, sample, row, live, column, COUNT, C, ALIGN).to(tl.float32)
        if plan[2] is not None:
            v *= tl.load(plan[2] + sample * plan[5] + row, mask=live, other=0.0)[:, None]
        return v
    else:
        first, last = tap_range(plan, sample, row, live)
        v = tl.full([row.shape[0], column.shape[0]], float("-inf") if MAX else 0.0, tl.float32)
        for start in range(0, tl.max(last - first), TAPS):
            for j in tl.static_range(TAPS):
                tap = first + start + j
                here = tap < last
                tap_row = tl.load(plan[1] + sample * plan[4] + tap, mask=here, other=-1)
                x = load_rows(sources, tap_row, sample, here, plan[7], column, COUNT, C, ALIGN).to(tl.float32)
                if plan[2] is not None:
                    x *= tl.load(plan[2] + sample * plan[5] + tap, mask=here, other=0.0)[:, None]
                if MAX:
                    v = tl.where(here[:, None] & ((x > v) | (x != x)), x, v)
                else:
                    v += x
        if MAX:
            v = tl.where((last > first)[:, None], v, 0.0)
        return v


def source_numbers(x: list[Tensor]) -> list[tuple[list[int | None], list[int | None]]]:
    """Per source (first, n1, n2) and (strides of b, n0, n1, n2) in elements."""
    numbers = []
    first = 0
    for source in x:
        axes = row_axes(source)
        axes = [axes[0] if axes else (1, 0), *axes[1:]]
        sizes = [first, *(size for size, _ in axes[1:])] + [None] * (3 - len(axes))
        batch = 0 if source.shape[0] == 1 else source.stride(0)
        numbers.append((sizes, [batch, *(stride for _, stride in axes)] + [None] * (3 - len(axes))))
        first += source.shape[1:-1].numel()
    return numbers


def over(strides: Iterable[int | None], align: int) -> list[int | None]:
    return [None if stride is None else stride // align for stride in strides]


def source_arguments(x: list[Tensor], tails: list[list[int | None]]) -> list[Any]:
    """x0_ptr .. x3_s2 of the kernels; a tail is what follows the address of a source."""
    arguments: list[Any] = []
    for source, tail in zip(x, tails, strict=True):
        arguments.append(source)
        arguments += tail
    return arguments + [None] * (8 * (SOURCES - len(x)))


def source_tails(numbers: list[tuple[list[int | None], list[int | None]]], align: int) -> list[list[int | None]]:
    return [[*sizes, *over(strides, align)] for sizes, strides in numbers]


def apart(x: list[Tensor]) -> int:
    """What of 8 divides the distances in elements between sources: the one thing that no look at them tells."""
    if len(x) == 1:
        return 8
    here, size = x[0].data_ptr(), x[0].element_size()
    return alignment([(source.data_ptr() - here) // size for source in x[1:]])


def row_steps(x: list[Tensor]) -> list[int]:
    """Every distance in elements inside sources that ALIGN must divide."""
    return [stride for source in x for stride in source.stride()[:-1]]


def plan_numbers(ptr: Tensor | None, idx: Tensor, weight: Tensor | None, n_rows: int) -> list[int]:
    """stride_ptr .. n_rows of the kernels, which follow (ptr, idx, weight)."""

    def over_samples(x: Tensor | None) -> int:
        return 0 if x is None or x.shape[0] == 1 else x.stride(0)

    return [over_samples(ptr), over_samples(idx), over_samples(weight), idx.shape[1], n_rows]


def checked(
    x: list[Tensor], ptr: Tensor | None, idx: Tensor, weight: Tensor | None
) -> tuple[list[Tensor], int, int, int, int]:
    """Everything that becomes an address, for callers who come past the public function: (sources with channels next
    to each other, b, n_out, c, rows of all sources)."""
    require(1 <= len(x) <= SOURCES, OP, "x", f"be 1 to {SOURCES} tensors", len(x))
    c, b = x[0].shape[-1], batch(x, idx)
    for i, source in enumerate(x):
        good = source.dim() >= 3 and source.shape[-1] == c and source.shape[0] in (1, b) and len(row_axes(source)) <= 3
        if not good:
            rule = f"have 1 or {b} samples of {c} channels, rows on at most 3 axes"
            raise ShapeError(refusal(OP, f"x[{i}]", rule, tuple(source.shape)))
        require(source.dtype == x[0].dtype, OP, f"x[{i}]", "have the dtype of x[0]", source.dtype)
        require(source.device == idx.device, OP, f"x[{i}]", f"be on the device of idx ({idx.device})", source.device)
    axes = bind(OP, ("idx", idx, "p k"), ("ptr", ptr, "p i"), ("weight", weight, "p k"))
    require(axes["p"] in (1, b), OP, "idx", f"have 1 or {b} samples", axes["p"])
    for name, tensor, dtype in (
        ("idx", idx, torch.int32),
        ("ptr", ptr, torch.int32),
        ("weight", weight, torch.float32),
    ):
        if tensor is not None:
            require(tensor.dtype == dtype, OP, name, f"have dtype {dtype}", tensor.dtype)
            unit = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
            require(unit, OP, name, "have stride 1 in its last dimension", tensor.stride())
    require(ptr is None or axes["i"] >= 1, OP, "ptr", "have n_out + 1 entries", axes.get("i"))
    n_out = axes["k"] if ptr is None else axes["i"] - 1
    return [unit_stride(source) for source in x], b, n_out, c, sum(source.shape[1:-1].numel() for source in x)


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ShapeError(refusal(OP, name, f"have shape {shape}", tuple(tensor.shape)))
    require(tensor.device == device, OP, name, f"be on the device of x ({device})", tensor.device)
