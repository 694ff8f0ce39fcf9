"""rearrange on Triton, backward: no atomics anywhere, so every sum has one order.

The gradient of the sources is the forward kernel on the transposed plan. Here is what comes before it: the epilogue
undone row by row, rows gathered again rather than saved, and the gradient of a maximum. A norm wants its row whole;
rows too long for registers leave their sums behind in a pass of their own, and are then undone in parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import FLOATS, require
from vkernels.library import unit_stride
from vkernels.ops.rearrange.torch_op import REDUCES, bwd_results
from vkernels.ops.rearrange.triton import blocks, check_how, parameters, scaled_sum, tile_of
from vkernels.ops.rearrange.triton_gather import (
    INDICES,
    OP,
    PLAN_SIZES,
    SOURCE_SIZES,
    apart,
    check_shape,
    checked,
    load_rows,
    plan_numbers,
    reduce_taps,
    row_steps,
    source_arguments,
    source_numbers,
    source_tails,
    tap_range,
)
from vkernels.rearrangement.plan import transpose_csr
from vkernels.triton.launch import alignment, cdiv, launch
from vkernels.triton.norm import gradient_means, norm_gradient, row_statistics

_STRIDES = [f"stride_{name}{axis}" for name in ("r", "dy", "ds") for axis in "br"]
WHOLE = 16384  # channels times the parameters that want gradients, at least 2: what registers hold of a row


@triton.jit
def _load_at(ptr, stride_b, stride_r, sample, row, column, inside, ALIGN: tl.constexpr):
    at = (sample * (stride_b * ALIGN) + row * (stride_r * ALIGN))[:, None] + column[None, :]
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(ptr, column, C: tl.constexpr):
    return tl.load(ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _before_norm(
    v, bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, sample, row, column, inside, scale,
    C: tl.constexpr, ALIGN: tl.constexpr, GATE_STEP: tl.constexpr,
):  # fmt: skip
    """u of rows whose gathered sums are `v`."""
    residual = None
    if residual_ptr is not None:
        residual = _load_at(residual_ptr, stride_rb, stride_rr, sample, row, column, inside, ALIGN)
    return scaled_sum(v, bias_ptr, gate_ptr, residual, column, scale, C, GATE_STEP)


@triton.jit(
    do_not_specialize=[*SOURCE_SIZES, *PLAN_SIZES, *_STRIDES[:4], "tasks", "n_out"],
    do_not_specialize_on_alignment=INDICES,
)
def _norm_sums_kernel(
    x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2,
    x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2,
    x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2,
    x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2,
    ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows,
    bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, norm_weight_ptr,
    dy_ptr, stride_dyb, stride_dyr, sums_ptr, tasks, n_out, scale, eps,
    COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, MAX: tl.constexpr, NORM: tl.constexpr,
    GATE_STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """sums [tasks, 4]: mean, 1 / deviation and the two of `gradient_means`, from parts of rows."""
    x0 = (x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2)
    x1 = (x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2)
    x2 = (x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2)
    x3 = (x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2)
    plan = (ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows)
    task = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sample, row, live = task // n_out, task % n_out, task < tasks
    zero = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_R, 1], tl.float32)
    if NORM == 1:
        total = zero
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            inside = live[:, None] & (column < C)[None, :]
            v = reduce_taps((x0, x1, x2, x3), plan, sample, row, live, column, COUNT, C, ALIGN, MAX, TAPS)
            u = _before_norm(
                v, bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, sample, row, column, inside, scale,
                C, ALIGN, GATE_STEP,
            )  # fmt: skip
            total += tl.where(inside, u, 0.0)
        mean = tl.sum(total, 1, keep_dims=True) / C
    squares, mixed, plain = zero, zero, zero
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside = live[:, None] & (column < C)[None, :]
        v = reduce_taps((x0, x1, x2, x3), plan, sample, row, live, column, COUNT, C, ALIGN, MAX, TAPS)
        u = _before_norm(
            v, bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, sample, row, column, inside, scale,
            C, ALIGN, GATE_STEP,
        )  # fmt: skip
        apart = tl.where(inside, u - mean, 0.0)
        g = _load_at(dy_ptr, stride_dyb, stride_dyr, sample, row, column, inside, ALIGN)
        if norm_weight_ptr is not None:
            g *= _load_vector(norm_weight_ptr, column, C)
        squares += apart * apart
        mixed += g * apart
        plain += g
    deviation = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / C + eps)
    to, there = sums_ptr + 4 * task[:, None], live[:, None]
    tl.store(to, mean, mask=there)
    tl.store(to + 1, deviation, mask=there)
    tl.store(to + 2, tl.sum(mixed, 1, keep_dims=True) * deviation / C, mask=there)
    tl.store(to + 3, tl.sum(plain, 1, keep_dims=True) / C if NORM == 1 else mean, mask=there)


@triton.jit
def _keep_sum(partial_ptr, which, acc, column, C: tl.constexpr):
    """One parameter's gradient over the rows of this program."""
    tl.store(partial_ptr + which * C + column, tl.sum(acc, 0), mask=column < C)


@triton.jit(
    do_not_specialize=[*SOURCE_SIZES, *PLAN_SIZES, *_STRIDES, "tasks", "n_out", "chunks"],
    do_not_specialize_on_alignment=INDICES,
)
def _rows_bwd_kernel(
    x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2,
    x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2,
    x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2,
    x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2,
    ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows,
    bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, norm_weight_ptr, norm_bias_ptr,
    dy_ptr, stride_dyb, stride_dyr, dsum_ptr, stride_dsb, stride_dsr, du_ptr, dv_ptr, partial_ptr, sums_ptr,
    tasks, n_out, chunks, scale, eps,
    COUNT: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, MAX: tl.constexpr, NORM: tl.constexpr,
    GATE_STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    x0 = (x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2)
    x1 = (x1_ptr, x1_first, x1_n1, x1_n2, x1_b, x1_s0, x1_s1, x1_s2)
    x2 = (x2_ptr, x2_first, x2_n1, x2_n2, x2_b, x2_s0, x2_s1, x2_s2)
    x3 = (x3_ptr, x3_first, x3_n1, x3_n2, x3_b, x3_s0, x3_s1, x3_s2)
    plan = (ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows)
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunk = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias, dgate, dweight, dnorm_bias = zero, zero, zero, zero
    end = tasks * (chunk + 1) // chunks
    for start in range(tasks * chunk // chunks, end, BLOCK_R):
        task = start + tl.arange(0, BLOCK_R)
        sample, row, live = task // n_out, task % n_out, task < end
        inside = live[:, None] & (column < C)[None, :]
        g = _load_at(dy_ptr, stride_dyb, stride_dyr, sample, row, column, inside, ALIGN)
        if NORM > 0 or gate_ptr is not None:
            v = reduce_taps((x0, x1, x2, x3), plan, sample, row, live, column, COUNT, C, ALIGN, MAX, TAPS)
        if NORM > 0:
            u = _before_norm(
                v, bias_ptr, gate_ptr, residual_ptr, stride_rb, stride_rr, sample, row, column, inside, scale,
                C, ALIGN, GATE_STEP,
            )  # fmt: skip
            if sums_ptr is None:
                mean, deviation = row_statistics(u, inside, eps, C, NORM == 1)
            else:
                sums, there = sums_ptr + 4 * task[:, None], live[:, None]
                mean, deviation = tl.load(sums, mask=there, other=0.0), tl.load(sums + 1, mask=there, other=0.0)
                mixed, plain = tl.load(sums + 2, mask=there, other=0.0), tl.load(sums + 3, mask=there, other=0.0)
            unit = tl.where(inside, (u - mean) * deviation, 0.0)
            if norm_bias_ptr is not None:
                dnorm_bias += g
            if norm_weight_ptr is not None:
                dweight += g * unit
                g *= _load_vector(norm_weight_ptr, column, C)
            if sums_ptr is None:
                mixed, plain = gradient_means(g, unit, C, NORM == 1)
            g = norm_gradient(g, unit, deviation, mixed, plain)
        if dsum_ptr is not None:
            g += _load_at(dsum_ptr, stride_dsb, stride_dsr, sample, row, column, inside, ALIGN)
        at = (task * C)[:, None] + column[None, :]
        tl.store(du_ptr + at, g.to(du_ptr.dtype.element_ty), mask=inside)
        g = tl.where(inside, g, 0.0) * scale
        if gate_ptr is not None:
            if bias_ptr is not None:
                v += _load_vector(bias_ptr, column, C)
            dgate += g * v
            g *= tl.load(gate_ptr + column * GATE_STEP, mask=column < C, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            dbias += g
        if dv_ptr is not None:
            tl.store(dv_ptr + at, g.to(dv_ptr.dtype.element_ty), mask=inside)
    partial_ptr += chunk * (4 * C)
    if bias_ptr is not None:
        _keep_sum(partial_ptr, 0, dbias, column, C)
    if gate_ptr is not None:
        _keep_sum(partial_ptr, 1, dgate, column, C)
    if norm_weight_ptr is not None:
        _keep_sum(partial_ptr, 2, dweight, column, C)
    if norm_bias_ptr is not None:
        _keep_sum(partial_ptr, 3, dnorm_bias, column, C)


def rows_bwd(
    dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
) -> tuple[Tensor, Tensor, Tensor]:
    du, dv, partial = bwd_results(dy, x, gate, scale)
    x, b, n_out, c, n_rows = checked(x, ptr, idx, weight)
    check_how(reduce, norm, c)
    require(x[0].dtype in FLOATS, OP, "x", "have a float dtype", x[0].dtype)
    device = x[0].device
    bias, gate, norm_weight, norm_bias = parameters(
        c, device, bias=bias, gate=gate, norm_weight=norm_weight, norm_bias=norm_bias
    )
    for name, tensor in (("dy", dy), ("dsum", dsum), ("residual", residual)):
        check_shape(name, tensor, (b, n_out, c), device)
    if dy.numel() == 0:
        return du, dv, partial.zero_()
    dy, dsum, residual = (None if t is None else unit_stride(t) for t in (dy, dsum, residual))
    dense = [t for t in (dy, dsum, residual) if t is not None]
    align = alignment([apart(x), *row_steps(x), *(stride for t in dense for stride in t.stride()[:2])])

    def by_row(t: Tensor | None) -> list[int | None]:
        return [None, None] if t is None else [t.stride(0) // align, t.stride(1) // align]

    gathered = (
        *source_arguments(x, source_tails(source_numbers(x), align)), ptr, idx, weight,
        *plan_numbers(ptr, idx, weight, n_rows), bias, gate, residual, *by_row(residual), norm_weight,
    )  # fmt: skip
    meta = {
        "COUNT": len(x), "C": c, "ALIGN": align, "MAX": reduce == REDUCES["max"], "NORM": norm,
        "GATE_STEP": 1 if gate is None else gate.stride(0),
    }  # fmt: skip
    wanted = sum(vector is not None for vector in (bias, gate, norm_weight, norm_bias))
    sums = None
    if in_parts := norm > 0 and c * max(wanted, 2) > WHOLE:
        sums = x[0].new_empty((b * n_out, 4), dtype=torch.float32)
        here = blocks("_norm_sums_kernel", x[0], whole=False)
        launch(
            _norm_sums_kernel, (cdiv(b * n_out, here["BLOCK_R"]),), *gathered, dy, *by_row(dy), sums, b * n_out, n_out,
            scale, eps, **meta, **here,
        )  # fmt: skip
    kernel = "_rows_bwd_kernel, in parts" if in_parts else "_rows_bwd_kernel"
    here = blocks(kernel, x[0], whole=norm > 0 and not in_parts)
    launch(
        _rows_bwd_kernel, (partial.shape[0] * cdiv(c, here["BLOCK_C"]),), *gathered, norm_bias,
        dy, *by_row(dy), dsum, *by_row(dsum), du, dv if dv.dim() == 3 else None, partial, sums,
        b * n_out, n_out, partial.shape[0], scale, eps, **meta, **here,
    )  # fmt: skip
    return du, dv, partial


_MAX_SIZES = [*SOURCE_SIZES[:7], *PLAN_SIZES, "stride_dyb", "stride_dyr", "tasks", "n_out"]


@triton.jit(do_not_specialize=_MAX_SIZES, do_not_specialize_on_alignment=INDICES)
def _max_shares_kernel(
    x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2,
    ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows,
    dy_ptr, stride_dyb, stride_dyr, best_ptr, share_ptr, tasks, n_out,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The maxima of the rows again, and what of dy each of their winners receives."""
    x0 = (x0_ptr, x0_first, x0_n1, x0_n2, x0_b, x0_s0, x0_s1, x0_s2)
    plan = (ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows)
    sample, row, live, column = tile_of(tasks, n_out, C, BLOCK_R, BLOCK_C)
    inside = live[:, None] & (column < C)[None, :]
    best = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    winners = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first, last = tap_range(plan, sample, row, live)
    for start in range(0, tl.max(last - first), TAPS):
        for j in tl.static_range(TAPS):
            tap = first + start + j
            here = tap < last
            tap_row = tl.load(idx_ptr + sample * stride_idx + tap, mask=here, other=-1)
            x = load_rows((x0,), tap_row, sample, here, n_rows, column, 1, C, ALIGN).to(tl.float32)
            better = here[:, None] & (x > best)
            equal = here[:, None] & (x == best)
            winners = tl.where(better, 1.0, winners + equal.to(tl.float32))
            best = tl.where(better, x, best)
    at = (sample * (stride_dyb * ALIGN) + row * (stride_dyr * ALIGN))[:, None] + column[None, :]
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = ((sample * n_out + row) * C)[:, None] + column[None, :]
    tl.store(best_ptr + at, best.to(best_ptr.dtype.element_ty), mask=inside)
    tl.store(share_ptr + at, dy / tl.maximum(winners, 1.0), mask=inside)


@triton.jit(
    do_not_specialize=["stride_xb", "stride_xr", *PLAN_SIZES, "tasks", "n_in"], do_not_specialize_on_alignment=INDICES
)
def _max_bwd_kernel(
    x_ptr, stride_xb, stride_xr, ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows,
    best_ptr, share_ptr, dx_ptr, tasks, n_in,
    C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Rows of x collect their shares from the output rows they took part in: the transposed plan."""
    plan = (ptr_ptr, idx_ptr, weight_ptr, stride_ptr, stride_idx, stride_weight, taps, n_rows)
    sample, row, live, column = tile_of(tasks, n_in, C, BLOCK_R, BLOCK_C)
    inside = live[:, None] & (column < C)[None, :]
    at = (sample * (stride_xb * ALIGN) + row * (stride_xr * ALIGN))[:, None] + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    dx = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first, last = tap_range(plan, sample, row, live)
    for start in range(0, tl.max(last - first), TAPS):
        for j in tl.static_range(TAPS):
            tap = first + start + j
            here = tap < last
            to = tl.load(idx_ptr + sample * stride_idx + tap, mask=here, other=-1).to(tl.int64)
            here = here & (to >= 0) & (to < n_rows)
            at = ((sample * n_rows + to) * C)[:, None] + column[None, :]
            won = here[:, None] & (column < C)[None, :]
            best = tl.load(best_ptr + at, mask=won, other=0.0)
            share = tl.load(share_ptr + at, mask=won, other=0.0)
            dx += tl.where(x == best, share, 0.0)
    tl.store(dx_ptr + ((sample * n_in + row) * C)[:, None] + column[None, :], dx, mask=inside)


def max_bwd(dy: Tensor, x: Tensor, ptr: Tensor, idx: Tensor, t_ptr: Tensor | None, t_idx: Tensor | None) -> Tensor:
    (x,), b, n_out, c, n_in = checked([x], ptr, idx, None)
    check_shape("dy", dy, (b, n_out, c), x.device)
    check_shape("x", x, (b, n_in, c), x.device)
    for name, tensor in (("x", x), ("dy", dy)):
        require(tensor.dtype in FLOATS, OP, name, "have a float dtype", tensor.dtype)
    dx = x.new_empty(x.shape, dtype=torch.float32)
    if dy.numel() == 0 or dx.numel() == 0:
        return dx.zero_()
    if t_ptr is None or t_idx is None:
        t_ptr, t_idx, _ = transpose_csr(idx, ptr, None, n_in, n_out)
    checked([dy], t_ptr, t_idx, None)
    require(t_ptr.shape[1] == n_in + 1, OP, "t_ptr", f"have {n_in + 1} entries", t_ptr.shape[1])
    dy = unit_stride(dy)
    best, share = x.new_empty(dy.shape), x.new_empty(dy.shape, dtype=torch.float32)
    align = alignment([stride for t in (x, dy) for stride in t.stride()[:2]])
    here = blocks("_max_shares_kernel", x, whole=False)
    launch(
        _max_shares_kernel, (cdiv(b * n_out, here["BLOCK_R"]) * cdiv(c, here["BLOCK_C"]),),
        x, *source_tails(source_numbers([x]), align)[0], ptr, idx, None, *plan_numbers(ptr, idx, None, n_in),
        dy, dy.stride(0) // align, dy.stride(1) // align, best, share, b * n_out, n_out, C=c, ALIGN=align, **here,
    )  # fmt: skip
    here = blocks("_max_bwd_kernel", x, whole=False)
    launch(
        _max_bwd_kernel, (cdiv(b * n_in, here["BLOCK_R"]) * cdiv(c, here["BLOCK_C"]),),
        x, x.stride(0) // align, x.stride(1) // align, t_ptr, t_idx, None, *plan_numbers(t_ptr, t_idx, None, n_out),
        best, share, dx, b * n_in, n_in, C=c, ALIGN=align, **here,
    )  # fmt: skip
    return dx
