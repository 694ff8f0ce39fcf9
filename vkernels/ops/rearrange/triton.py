"""rearrange on Triton, rows: every row is gathered into registers, goes through the epilogue there and leaves once.

A program takes BLOCK elements: several rows where rows are short, a part of the columns where they are long. A norm
needs the row whole. Affine moves are in triton_affine.py, the backward in triton_backward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import FLOATS, require
from vkernels.library import unit_stride
from vkernels.ops.rearrange.torch_op import NORMS, REDUCES, WIDEST_NORM, rows_results
from vkernels.ops.rearrange.triton_gather import (
    INDICES,
    OP,
    PLAN_SIZES,
    SOURCE_SIZES,
    apart,
    check_shape,
    checked,
    move_taps,
    over,
    plan_numbers,
    reduce_taps,
    row_steps,
    source_arguments,
    source_numbers,
    source_tails,
)
from vkernels.remember import planned
from vkernels.triton.launch import alignment, arch, cdiv, launch, power_of_2
from vkernels.triton.norm import row_statistics
from vkernels.triton.tiles import tiles

MANY_TAPS = 16  # a row, on average
# Moves see bits: one kernel for every dtype of a width, and NaNs keep their payload.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def tile_of(tasks, n_out, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(sample, row, live, columns) of a program: a block of output rows of all samples x a block of columns."""
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0).to(tl.int64)
    task = block // parts * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (block % parts).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    return task // n_out, task % n_out, task < tasks, column


@triton.jit
def _target(rows_ptr, stride_rows, sample, row, live, s_out):
    """(row of the output, whether there is one)."""
    if rows_ptr is None:
        return row, live
    else:
        to = tl.load(rows_ptr + sample * stride_rows + row, mask=live, other=-1).to(tl.int64)
        return to, live & (to >= 0) & (to < s_out)


# What grows with the number of tokens must not be specialised on, or every length would compile anew.
_SIZES = [*SOURCE_SIZES, *PLAN_SIZES, "stride_rows", "stride_yb", "stride_yr", "tasks", "n_out", "s_out"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=INDICES)
def _move_rows_kernel(
    x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2,
    x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2,
    x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2,
    x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2,
    ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows,
    rows_ptr, y_ptr, stride_rows, stride_yb, stride_yr, tasks, n_out, s_out,
    COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    x0 = (x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2)
    x1 = (x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2)
    x2 = (x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2)
    x3 = (x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2)
    plan = (ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows)
    sample, row, live, column = tile_of(tasks, n_out, C, BLOCK_R, BLOCK_C)
    to, live = _target(rows_ptr, stride_rows, sample, row, live, s_out)
    x = move_taps((x0, x1, x2, x3), plan, sample, row, live, column, COUNT, C, ALIGN)
    y_at = sample * (stride_yb * ALIGN) + to * (stride_yr * ALIGN)
    tl.store(y_ptr + y_at[:, None] + column[None, :], x, mask=live[:, None] & (column < C)[None, :])


@triton.jit
def scaled_sum(v, bias_ptr, gate_ptr, residual, column, scale, C: tl.constexpr, GATE_STEP: tl.constexpr):
    """u = residual + scale * gate * (v + bias)."""
    if bias_ptr is not None:
        v += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        v *= tl.load(gate_ptr + column * GATE_STEP, mask=column < C, other=0.0).to(tl.float32)[None, :]
    v *= scale
    if residual is not None:
        v += residual
    return v


@triton.jit(
    do_not_specialize=[*_SIZES, "stride_rb", "stride_rr", "stride_sb", "stride_sr"],
    do_not_specialize_on_alignment=INDICES,
)
def _rows_kernel(
    x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2,
    x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2,
    x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2,
    x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2,
    ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows,
    rows_ptr, y_ptr, stride_rows, stride_yb, stride_yr, tasks, n_out, s_out,
    bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, norm_weight_ptr, norm_bias_ptr,
    sum_ptr, stride_sb, stride_sr, scale, eps,
    COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, MAX: tl.constexpr, NORM: tl.constexpr,
    ACCUMULATE: tl.constexpr, GATE_STEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    x0 = (x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2)
    x1 = (x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2)
    x2 = (x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2)
    x3 = (x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2)
    plan = (ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows)
    sample, row, live, column = tile_of(tasks, n_out, C, BLOCK_R, BLOCK_C)
    to, live = _target(rows_ptr, stride_rows, sample, row, live, s_out)
    inside = live[:, None] & (column < C)[None, :]
    u = reduce_taps((x0, x1, x2, x3), plan, sample, row, live, column, COUNT, C, ALIGN, MAX, TAPS)
    residual = None
    if residual_ptr is not None:
        at = (sample * (stride_rb * ALIGN) + row * (stride_rr * ALIGN))[:, None] + column[None, :]
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = scaled_sum(u, bias_ptr, gate_ptr, residual, column, scale, C, GATE_STEP)
    if sum_ptr is not None:
        at = (sample * (stride_sb * ALIGN) + row * (stride_sr * ALIGN))[:, None] + column[None, :]
        tl.store(sum_ptr + at, u.to(sum_ptr.dtype.element_ty), mask=inside)
    if NORM > 0:
        mean, deviation = row_statistics(u, inside, eps, C, NORM == 1)
        u = (u - mean) * deviation
        if norm_weight_ptr is not None:
            u *= tl.load(norm_weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            u += tl.load(norm_bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + (sample * (stride_yb * ALIGN) + to * (stride_yr * ALIGN))[:, None] + column[None, :]
    if ACCUMULATE:
        u += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, u.to(y_ptr.dtype.element_ty), mask=inside)


def blocks(kernel: str, x: Tensor, whole: bool) -> dict[str, int]:
    """Tiles of a launch over rows of `x`: BLOCK elements, shaped to the row length."""
    c = x.shape[-1]
    here = dict(tiles(OP, kernel, arch(x.device), d=c, bytes=x.element_size()))
    block, widest = here.pop("BLOCK"), here.pop("BLOCK_C")
    columns = power_of_2(c)
    columns = columns if whole else min(columns, widest)
    return {**here, "BLOCK_R": max(1, block // columns), "BLOCK_C": columns}


def _kind(norm: int, idx: Tensor, n_out: int) -> str:
    """Whose tiles serve a launch. Rows of many taps want few elements a program and many taps under way."""
    if norm:
        return "_rows_kernel, norm"
    return "_rows_kernel, many taps" if idx.shape[1] >= MANY_TAPS * n_out else "_rows_kernel"


def parameters(c: int, device: torch.device, **vectors: Tensor | None) -> list[Tensor | None]:
    """The epilogue's vectors of c channels, checked. A gate of stride 0 stays as it is."""
    found = []
    for name, vector in vectors.items():
        check_shape(name, vector, (c,), device)
        found.append(vector if vector is None or (name == "gate" and vector.stride(0) == 0) else unit_stride(vector))
    return found


def check_how(reduce: int, norm: int, c: int) -> None:
    require(reduce in REDUCES.values(), OP, "reduce", "be 0 or 1", reduce)
    require(norm in NORMS.values(), OP, "norm", "be 0, 1 or 2", norm)
    require(norm == 0 or c <= WIDEST_NORM, OP, "x", f"have at most {WIDEST_NORM} channels under a norm", c)


def _plan(
    x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, accumulate,
    y: Tensor, total: Tensor | None,
) -> Callable[..., None]:  # fmt: skip
    x, b, n_out, c, n_rows = checked(x, ptr, idx, weight)
    check_how(reduce, norm, c)
    device = x[0].device
    bias, gate, norm_weight, norm_bias = parameters(
        c, device, bias=bias, gate=gate, norm_weight=norm_weight, norm_bias=norm_bias
    )
    check_shape("residual", residual, (b, n_out, c), device)
    check_shape("y", y, (b, y.shape[1] if rows is not None and y.dim() == 3 else n_out, c), device)
    require(y.stride(-1) == 1 or c <= 1, OP, "out", "have stride 1 in its last dimension", y.stride())
    if rows is not None:
        check_shape("rows", rows, (rows.shape[0] if rows.shape[0] in (1, b) else b, n_out), device)
        good = rows.dtype == torch.int32 and rows.is_contiguous()
        require(good, OP, "rows", "have dtype int32 and be contiguous", rows.dtype)
    if y.numel() == 0 or n_out == 0:
        return lambda *args: None
    plain = bias is gate is residual is total is ptr is weight is None and not (norm or accumulate) and scale == 1.0
    residual = None if residual is None else unit_stride(residual)
    moves = plain and y.dtype == x[0].dtype
    for name, tensor in (("x", x[0]), ("y", y)):
        good = tensor.dtype in FLOATS or moves
        require(good, OP, name, "have a float dtype unless single rows are moved as they are", tensor.dtype)
    here = blocks("_move_rows_kernel" if moves else _kind(norm, idx, n_out), x[0], whole=norm > 0)
    meta = {"COUNT": len(x), "C": c, **here}
    if not moves:
        step = 1 if gate is None else gate.stride(0)
        meta |= {"MAX": reduce == REDUCES["max"], "NORM": norm, "ACCUMULATE": accumulate, "GATE_STEP": step}
    strides: list[Any] = [(None, None) if t is None else t.stride()[:2] for t in (y, residual, total)]
    over_samples = 0 if rows is None or rows.shape[0] == 1 else rows.stride(0)
    numbers = _Numbers(
        source_numbers(x), [*row_steps(x), *(s for pair in strides for s in pair if s is not None)],
        plan_numbers(ptr, idx, weight, n_rows), over_samples, strides, (b * n_out, n_out, y.shape[1]),
    )  # fmt: skip
    grid = (cdiv(b * n_out, here["BLOCK_R"]) * cdiv(c, here["BLOCK_C"]),)
    run = _moving(BITS[y.element_size()]) if moves else _finishing(bias is gate is norm_weight is norm_bias is None)
    at = cache(numbers.at)  # one of four alignments

    def start(x: list[Tensor], *rest: Any) -> None:
        x = [unit_stride(source) for source in x]
        run(grid, meta, at(apart(x)), x, *rest)

    return start


class _Numbers(NamedTuple):
    """The numbers of a launch, strides in elements."""

    sources: list[tuple[list[int | None], list[int | None]]]
    steps: list[int]  # what ALIGN must divide
    plan: list[int]
    over_samples: int
    strides: list[Any]  # (sample, row) of y, residual, total
    sizes: tuple[int, int, int]

    def at(self, distance: int) -> tuple[Any, ...]:
        """(ALIGN, tails of the sources, after the plan, after y, after the residual, after the total) where sources
        lie a multiple of `distance` apart."""
        align = alignment([distance, *self.steps])
        y, residual, total = (over(pair, align) for pair in self.strides)
        return (
            align,
            source_tails(self.sources, align),
            self.plan,
            [self.over_samples, *y, *self.sizes],
            residual,
            total,
        )


def _moving(bits: torch.dtype) -> Callable[..., None]:
    def run(grid, meta, numbers, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, scale, eps,
            y, total) -> None:  # fmt: skip
        align, tails, plan, after_y, _, _ = numbers
        x = [source.view(bits) for source in x]
        launch(
            _move_rows_kernel, grid, *source_arguments(x, tails), ptr, idx, weight, *plan, rows, y.view(bits),
            *after_y, ALIGN=align, **meta,
        )  # fmt: skip

    return run


def _finishing(bare: bool) -> Callable[..., None]:
    """`bare`: there are no parameters to look at."""

    def run(grid, meta, numbers, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, scale, eps,
            y, total) -> None:  # fmt: skip
        align, tails, plan, after_y, after_residual, after_total = numbers
        if not bare:
            bias, norm_weight, norm_bias = map(_row, (bias, norm_weight, norm_bias))
            gate = gate if gate is None or gate.stride(0) == 0 else unit_stride(gate)
        launch(
            _rows_kernel, grid, *source_arguments(x, tails), ptr, idx, weight, *plan, rows, y, *after_y,
            bias, gate, _row(residual), *after_residual, norm_weight, norm_bias, total, *after_total, scale, eps,
            ALIGN=align, **meta,
        )  # fmt: skip

    return run


def _row(x: Tensor | None) -> Tensor | None:
    return None if x is None else unit_stride(x)


@planned
def rows(
    x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
    reduce, norm, scale, eps, with_sum, dtype,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    y, total = rows_results(x, ptr, idx, with_sum, dtype)
    shape, rest_shape = y.shape, total.shape
    finish = _plan(
        x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, None, reduce, norm, scale, False,
        y, total if with_sum else None,
    )  # fmt: skip

    def run(
        x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
        reduce, norm, scale, eps, with_sum, dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        like = x[0]
        y = like.new_empty(shape) if dtype == like.dtype else like.new_empty(shape, dtype=dtype)
        total = like.new_empty(rest_shape)
        finish(
            x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, None, scale, eps,
            y, total if with_sum else None,
        )  # fmt: skip
        return y, total

    return run


@planned
def rows_into(
    out, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, eps, accumulate
) -> Callable[..., None]:
    finish = _plan(
        x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, accumulate,
        out, None,
    )  # fmt: skip

    def run(
        out, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, eps, add
    ) -> None:
        finish(x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, scale, eps, out, None)

    return run
