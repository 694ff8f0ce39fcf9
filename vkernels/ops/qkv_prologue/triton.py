"""qkv_prologue on Triton: one pass over the packed projection; angles once per token, shared by its heads.

A head is held as its pairs and what is left of it: (x0, x1) turn, xr does not. Where nothing turns, neighbours pair.
HEAD is (d, first element that turns, pairs, pairs padded, parts of the rotary size (0: neighbours), d padded, whether
anything is left over, whether anything turns); NORM is (whether there is a norm, after the rotation, over all heads,
what is added to its weights).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import bind, require
from vkernels.library import unit_stride
from vkernels.remember import planned
from vkernels.triton.launch import alignment, arch, cdiv, launch, power_of_2
from vkernels.triton.rotate import load_pairs, position_angles, store_pairs, turn
from vkernels.triton.tiles import tiles

NAME = "qkv_prologue"
NO_NORM: tl.constexpr = tl.constexpr((False, False, False, 0.0))


@triton.jit
def _columns_left(HEAD: tl.constexpr):
    """Columns [d padded], and which of them do not turn."""
    rest = tl.arange(0, HEAD[5])
    return rest, (rest < HEAD[0]) & ((rest < HEAD[1]) | (rest >= HEAD[1] + 2 * HEAD[2]))


@triton.jit
def _load(ptr, at, inside, HEAD: tl.constexpr):
    """Heads that start at `at` [..., 1], in float32."""
    OFFSET: tl.constexpr = HEAD[1]
    x0, x1 = load_pairs(ptr, at + OFFSET, inside, tl.arange(0, HEAD[3]), HEAD[2], HEAD[3], HEAD[4])
    if HEAD[6]:
        rest, left = _columns_left(HEAD)
        return x0, x1, tl.load(ptr + at + rest, mask=inside & left, other=0.0).to(tl.float32)
    else:  # Triton compiles whatever follows an if
        return x0, x1, x0


@triton.jit
def _store(ptr, at, inside, x0, x1, xr, HEAD: tl.constexpr):
    """The inverse of `_load`, rounded to what `ptr` points to."""
    OFFSET: tl.constexpr = HEAD[1]
    store_pairs(ptr, at + OFFSET, x0, x1, inside, tl.arange(0, HEAD[3]), HEAD[2], HEAD[3], HEAD[4])
    if HEAD[6]:
        rest, left = _columns_left(HEAD)
        tl.store(ptr + at + rest, xr.to(ptr.dtype.element_ty), mask=inside & left)


@triton.jit
def _product(x0, x1, xr, y0, y1, yr, HEAD: tl.constexpr):
    """Sum of x y over each head: [..., heads]."""
    total = tl.sum(x0 * y0 + x1 * y1, -1)
    if HEAD[6]:
        total += tl.sum(xr * yr, -1)
    return total


@triton.jit
def _load_biased(qkv_ptr, bias_ptr, at, column, live, there, HEAD: tl.constexpr, BIAS: tl.constexpr):
    """Heads at `column` [heads] of rows `at` [tokens], bias added."""
    inside = live[:, None, None] & there[None, :, None]
    x0, x1, xr = _load(qkv_ptr, at[:, None, None] + column[None, :, None], inside, HEAD)
    if BIAS:
        b0, b1, br = _load(bias_ptr, column[None, :, None], there[None, :, None], HEAD)
        x0, x1, xr = x0 + b0, x1 + b1, xr + br
    return x0, x1, xr


@triton.jit
def _load_weight(norm_ptr, head, there, HEAD: tl.constexpr, NORM: tl.constexpr):
    """Weights of the norm of these heads: [1, heads or 1, columns]."""
    if NORM[2]:
        w0, w1, wr = _load(norm_ptr, (head * HEAD[0])[None, :, None], there[None, :, None], HEAD)
    else:
        one = tl.zeros([1, 1, 1], tl.int32)
        w0, w1, wr = _load(norm_ptr, one, one == 0, HEAD)
    return w0 + NORM[3], w1 + NORM[3], wr + NORM[3]


@triton.jit
def _tokens_at(block, tokens, s, BLOCK_S: tl.constexpr):
    """(token of the call, sample, token of the sample, is it one)."""
    row = block * BLOCK_S + tl.arange(0, BLOCK_S).to(tl.int64)
    return row, row // s, row % s, row < tokens


@triton.jit
def _angles(
    pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_ptr, freq_ptr, scale, sample, token, live, HEAD: tl.constexpr
):
    """Cosines and sines [tokens, 1, pairs], times the scale; zeros where nothing turns."""
    if HEAD[7]:
        c, w = position_angles(
            pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_ptr, freq_ptr, sample, token, live,
            tl.arange(0, HEAD[3]), HEAD[2],
        )  # fmt: skip
        return c[:, None, :] * scale, w[:, None, :] * scale
    else:
        return 0.0, 0.0


@triton.jit
def _inverse_rms_of_all(
    qkv_ptr, bias_ptr, at, base, heads, live, scale, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """1 / root mean square [tokens] of all heads of a token together."""
    total = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        x0, x1, xr = _load_biased(qkv_ptr, bias_ptr, at, (base + head) * HEAD[0], live, head < heads, HEAD, BIAS)
        total += tl.sum(_sum_of_squares(x0, x1, xr, scale, HEAD, NORM), 1)
    return tl.rsqrt(total / (heads * HEAD[0]).to(tl.float32) + eps)


@triton.jit
def _sum_of_squares(x0, x1, xr, scale, HEAD: tl.constexpr, NORM: tl.constexpr):
    """Of each head as the norm sees it. A rotation keeps the length of a pair, so it need not be done for this."""
    if HEAD[7] and NORM[1]:
        total = tl.sum(x0 * x0 + x1 * x1, -1) * (scale * scale)
        if HEAD[6]:
            total += tl.sum(xr * xr, -1)
        return total
    else:
        return _product(x0, x1, xr, x0, x1, xr, HEAD)


@triton.jit
def _forward_heads(
    qkv_ptr, out_ptr, bias_ptr, norm_ptr, at, out_at, stride_on, live, base, first, heads, chunk, splits,
    c, w, inverse, scale, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, TURNS: tl.constexpr, BIAS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Every `splits`-th chunk, from `chunk` on, of heads first .. first + heads."""
    for start in range(chunk * BLOCK_H, heads, splits * BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        there = head < heads
        head = first + head
        x0, x1, xr = _load_biased(qkv_ptr, bias_ptr, at, (base + head) * HEAD[0], live, there, HEAD, BIAS)
        if NORM[0]:
            w0, w1, wr = _load_weight(norm_ptr, head, there, HEAD, NORM)
            if NORM[2]:
                r = inverse[:, None, None]
            else:
                r = tl.rsqrt(_sum_of_squares(x0, x1, xr, scale, HEAD, NORM) / HEAD[0] + eps)[:, :, None]
            if TURNS and NORM[1]:
                x0, x1 = turn(x0, x1, c, w)
            x0, x1, xr = x0 * r * w0, x1 * r * w1, xr * r * wr
            if TURNS and not NORM[1]:
                x0, x1 = turn(x0, x1, c, w)
        elif TURNS:
            x0, x1 = turn(x0, x1, c, w)
        to = out_at[:, None, None] + (head.to(tl.int64) * stride_on)[None, :, None]
        _store(out_ptr, to, live[:, None, None] & there[None, :, None], x0, x1, xr, HEAD)


# What grows with the number of tokens must not be specialised on, or every length would compile anew.
@triton.jit(do_not_specialize=[
    "tokens", "s", "splits", "stride_xb", "stride_qb", "stride_kb", "stride_vb", "stride_pa", "stride_pb",
])  # fmt: skip
def _qkv_prologue_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, pos_ptr, axis_ptr, freq_ptr,
    stride_xb, stride_xs, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn,
    stride_vb, stride_vs, stride_vn, stride_pa, stride_pb, stride_ps, axes, tokens, s, n, m, splits, scale, eps,
    HEAD: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    _, sample, token, live = _tokens_at(tl.program_id(0), tokens, s, BLOCK_S)
    at = (sample * stride_xb + token * stride_xs) * ALIGN
    q_at = (sample * stride_qb + token * stride_qs) * ALIGN
    k_at = (sample * stride_kb + token * stride_ks) * ALIGN
    v_at = (sample * stride_vb + token * stride_vs) * ALIGN
    q_inverse, k_inverse = 0.0, 0.0
    if Q_NORM[0] and Q_NORM[2]:
        q_inverse = _inverse_rms_of_all(
            qkv_ptr, bias_ptr, at, 0, n, live, scale, eps, HEAD, Q_NORM, BIAS, BLOCK_S, BLOCK_H
        )
    if K_NORM[0] and K_NORM[2]:
        k_inverse = _inverse_rms_of_all(
            qkv_ptr, bias_ptr, at, n, m, live, scale, eps, HEAD, K_NORM, BIAS, BLOCK_S, BLOCK_H
        )
    q_chunks, k_chunks = (n // ROWS + BLOCK_H - 1) // BLOCK_H, (m // ROWS + BLOCK_H - 1) // BLOCK_H
    turn_of = split  # which chunk of what comes next is this program's first
    for spec_row in range(ROWS):
        c, w = _angles(
            pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_ptr + spec_row * HEAD[2] if HEAD[7] else axis_ptr,
            freq_ptr, scale, sample, token, live, HEAD,
        )  # fmt: skip
        _forward_heads(
            qkv_ptr, q_ptr, bias_ptr, q_norm_ptr, at, q_at, stride_qn * ALIGN, live,
            0, spec_row * (n // ROWS), n // ROWS, turn_of, splits, c, w, q_inverse, scale, eps,
            HEAD, Q_NORM, HEAD[7], BIAS, BLOCK_H,
        )  # fmt: skip
        turn_of = (turn_of + q_chunks * (splits - 1)) % splits
        _forward_heads(
            qkv_ptr, k_ptr, bias_ptr, k_norm_ptr, at, k_at, stride_kn * ALIGN, live,
            n, spec_row * (m // ROWS), m // ROWS, turn_of, splits, c, w, k_inverse, scale, eps,
            HEAD, K_NORM, HEAD[7], BIAS, BLOCK_H,
        )  # fmt: skip
        turn_of = (turn_of + k_chunks * (splits - 1)) % splits
    _forward_heads(
        qkv_ptr, v_ptr, bias_ptr, k_norm_ptr, at, v_at, stride_vn * ALIGN, live,
        n + m, 0, m, turn_of, splits, 0.0, 0.0, 0.0, scale, eps,
        HEAD, NO_NORM, False, BIAS, BLOCK_H,
    )  # fmt: skip


@triton.jit
def _norm_operands(
    qkv_ptr, dy_ptr, bias_ptr, w0, w1, wr, at, dy_at, stride_dn, live, base, head, there, c, w,
    HEAD: tl.constexpr, NORM: tl.constexpr, TURNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient of what the norm gave, and what the norm took (zeros without one)."""
    inside = live[:, None, None] & there[None, :, None]
    g0, g1, gr = _load(dy_ptr, dy_at[:, None, None] + (head.to(tl.int64) * stride_dn)[None, :, None], inside, HEAD)
    if TURNS and not (NORM[0] and NORM[1]):
        g0, g1 = turn(g0, g1, c, -w)
    if NORM[0]:
        x0, x1, xr = _load_biased(qkv_ptr, bias_ptr, at, (base + head) * HEAD[0], live, there, HEAD, BIAS)
        if TURNS and NORM[1]:
            x0, x1 = turn(x0, x1, c, w)
        return g0, g1, gr, x0, x1, xr
    else:
        return g0, g1, gr, g0, g1, gr


@triton.jit
def _add_stats(
    qkv_ptr, dy_ptr, bias_ptr, norm_ptr, at, dy_at, stride_dn, live, base, first, heads, c, w, squares, mixed,
    HEAD: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sums over heads [tokens] of x x and of x times its gradient, added to those of other heads."""
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        there = head < heads
        head = first + head
        w0, w1, wr = _load_weight(norm_ptr, head, there, HEAD, NORM)
        g0, g1, gr, x0, x1, xr = _norm_operands(
            qkv_ptr, dy_ptr, bias_ptr, w0, w1, wr, at, dy_at, stride_dn, live, base, head, there, c, w,
            HEAD, NORM, HEAD[7], BIAS,
        )  # fmt: skip
        squares += tl.sum(_product(x0, x1, xr, x0, x1, xr, HEAD), 1)
        mixed += tl.sum(_product(x0, x1, xr, g0 * w0, g1 * w1, gr * wr, HEAD), 1)
    return squares, mixed


@triton.jit(do_not_specialize=["tokens", "s", "stride_xb", "stride_qb", "stride_kb", "stride_pa", "stride_pb"])
def _norm_stats_kernel(
    qkv_ptr, dq_ptr, dk_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, pos_ptr, axis_ptr, freq_ptr, stats_ptr,
    stride_xb, stride_xs, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn,
    stride_pa, stride_pb, stride_ps, axes, tokens, s, n, m, scale, eps,
    HEAD: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """For norms over all heads: what their gradient needs of a whole token. stats [tokens, 4]: 1 / rms and the mean of
    x times its gradient, of q and of k."""
    row, sample, token, live = _tokens_at(tl.program_id(0), tokens, s, BLOCK_S)
    at = (sample * stride_xb + token * stride_xs) * ALIGN
    q_at = (sample * stride_qb + token * stride_qs) * ALIGN
    k_at = (sample * stride_kb + token * stride_ks) * ALIGN
    zero = tl.zeros([BLOCK_S], tl.float32)
    q_squares, q_mixed, k_squares, k_mixed = zero, zero, zero, zero
    for spec_row in range(ROWS):
        c, w = _angles(
            pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_ptr + spec_row * HEAD[2] if HEAD[7] else axis_ptr,
            freq_ptr, scale, sample, token, live, HEAD,
        )  # fmt: skip
        if Q_NORM[0]:
            q_squares, q_mixed = _add_stats(
                qkv_ptr, dq_ptr, bias_ptr, q_norm_ptr, at, q_at, stride_qn * ALIGN, live, 0, spec_row * (n // ROWS),
                n // ROWS, c, w, q_squares, q_mixed, HEAD, Q_NORM, BIAS, BLOCK_H,
            )  # fmt: skip
        if K_NORM[0]:
            k_squares, k_mixed = _add_stats(
                qkv_ptr, dk_ptr, bias_ptr, k_norm_ptr, at, k_at, stride_kn * ALIGN, live, n, spec_row * (m // ROWS),
                m // ROWS, c, w, k_squares, k_mixed, HEAD, K_NORM, BIAS, BLOCK_H,
            )  # fmt: skip
    q_columns, k_columns = (n * HEAD[0]).to(tl.float32), (m * HEAD[0]).to(tl.float32)
    inverse = tl.join(tl.rsqrt(q_squares / q_columns + eps), tl.rsqrt(k_squares / k_columns + eps))
    stats = tl.reshape(tl.join(inverse, tl.join(q_mixed / q_columns, k_mixed / k_columns)), [BLOCK_S, 4])
    tl.store(stats_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :], stats, mask=live[:, None])


@triton.jit
def _backward_heads(
    qkv_ptr, dy_ptr, dqkv_ptr, bias_ptr, norm_ptr, stats_ptr, pos_ptr, axis_ptr, freq_ptr, db_ptr, dw_ptr,
    stride_xb, stride_xs, stride_db, stride_ds, stride_dn, stride_pa, stride_pb, stride_ps, axes,
    tokens, s, columns, base, first, start, heads, scale, eps,
    HEAD: tl.constexpr, NORM: tl.constexpr, TURNS: tl.constexpr, BIAS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Heads `start` ... of heads first .. first + heads, of every part-th block of tokens; sums over those tokens."""
    head = start + tl.arange(0, BLOCK_H)
    there = head < heads
    head = first + head
    column = (base + head) * HEAD[0]
    R: tl.constexpr = HEAD[3]
    LEFT: tl.constexpr = HEAD[5] if HEAD[6] else HEAD[3]
    b0, b1, br = (
        tl.zeros([BLOCK_H, R], tl.float32),
        tl.zeros([BLOCK_H, R], tl.float32),
        tl.zeros([BLOCK_H, LEFT], tl.float32),
    )
    n0, n1, nr = b0, b1, br
    w0, w1, wr = 0.0, 0.0, 0.0
    if NORM[0]:
        w0, w1, wr = _load_weight(norm_ptr, head, there, HEAD, NORM)
    for block in range(tl.program_id(0), (tokens + BLOCK_S - 1) // BLOCK_S, tl.num_programs(0)):
        row, sample, token, live = _tokens_at(block, tokens, s, BLOCK_S)
        at, dy_at = (sample * stride_xb + token * stride_xs) * ALIGN, (sample * stride_db + token * stride_ds) * ALIGN
        c, w = 0.0, 0.0
        if TURNS:
            c, w = _angles(
                pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_ptr, freq_ptr, scale, sample, token, live, HEAD
            )
        g0, g1, gr, x0, x1, xr = _norm_operands(
            qkv_ptr, dy_ptr, bias_ptr, w0, w1, wr, at, dy_at, stride_dn, live, base, head, there, c, w,
            HEAD, NORM, TURNS, BIAS,
        )  # fmt: skip
        if NORM[0]:
            if NORM[2]:
                r = tl.load(stats_ptr + row * 4, mask=live, other=0.0)[:, None, None]
                mean = tl.load(stats_ptr + row * 4 + 1, mask=live, other=0.0)[:, None, None]
            else:
                r = tl.rsqrt(_product(x0, x1, xr, x0, x1, xr, HEAD) / HEAD[0] + eps)
                r = tl.where(live[:, None] & there[None, :], r, 0.0)[:, :, None]
                mean = (_product(x0, x1, xr, g0 * w0, g1 * w1, gr * wr, HEAD) / HEAD[0])[:, :, None]
            n0, n1, nr = n0 + tl.sum(g0 * x0 * r, 0), n1 + tl.sum(g1 * x1 * r, 0), nr + tl.sum(gr * xr * r, 0)
            back = r * r * r * mean
            g0, g1, gr = g0 * w0 * r - x0 * back, g1 * w1 * r - x1 * back, gr * wr * r - xr * back
            if TURNS and NORM[1]:
                g0, g1 = turn(g0, g1, c, -w)
        if BIAS:
            b0, b1, br = b0 + tl.sum(g0, 0), b1 + tl.sum(g1, 0), br + tl.sum(gr, 0)
        to = (row * columns)[:, None, None] + column[None, :, None]
        _store(dqkv_ptr, to, live[:, None, None] & there[None, :, None], g0, g1, gr, HEAD)
    if BIAS:
        _store(db_ptr, column[:, None], there[:, None], b0, b1, br, HEAD)
    if NORM[0]:
        _store(dw_ptr, (head * HEAD[0])[:, None], there[:, None], n0, n1, nr, HEAD)


@triton.jit(do_not_specialize=[
    "tokens", "s", "stride_xb", "stride_qb", "stride_kb", "stride_vb", "stride_pa", "stride_pb",
])  # fmt: skip
def _qkv_prologue_bwd_kernel(
    qkv_ptr, dq_ptr, dk_ptr, dv_ptr, dqkv_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, stats_ptr, pos_ptr, axis_ptr,
    freq_ptr, sums_ptr, stride_xb, stride_xs, stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn,
    stride_vb, stride_vs, stride_vn, stride_pa, stride_pb, stride_ps, axes, tokens, s, n, m, sums, scale, eps,
    HEAD: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = HEAD[0]
    q_chunks, k_chunks = (n // ROWS + BLOCK_H - 1) // BLOCK_H, (m // ROWS + BLOCK_H - 1) // BLOCK_H
    columns = (n + 2 * m) * D
    db_ptr = sums_ptr + tl.program_id(0) * sums  # bias; then, of every head, the norm of q; then that of k
    dwq_ptr = db_ptr + columns if BIAS else db_ptr
    dwk_ptr = dwq_ptr + n * D if Q_NORM[0] else dwq_ptr
    chunk = tl.program_id(1)
    if chunk < ROWS * q_chunks:
        spec_row = chunk // q_chunks
        _backward_heads(
            qkv_ptr, dq_ptr, dqkv_ptr, bias_ptr, q_norm_ptr, stats_ptr, pos_ptr,
            axis_ptr + spec_row * HEAD[2] if HEAD[7] else axis_ptr, freq_ptr, db_ptr, dwq_ptr,
            stride_xb, stride_xs, stride_qb, stride_qs, stride_qn * ALIGN,
            stride_pa, stride_pb, stride_ps, axes, tokens, s, columns,
            0, spec_row * (n // ROWS), chunk % q_chunks * BLOCK_H, n // ROWS, scale, eps,
            HEAD, Q_NORM, HEAD[7], BIAS, ALIGN, BLOCK_S, BLOCK_H,
        )  # fmt: skip
    elif chunk < ROWS * (q_chunks + k_chunks):
        chunk = chunk - ROWS * q_chunks
        spec_row = chunk // k_chunks
        _backward_heads(
            qkv_ptr, dk_ptr, dqkv_ptr, bias_ptr, k_norm_ptr, stats_ptr + 2 if K_NORM[2] else stats_ptr, pos_ptr,
            axis_ptr + spec_row * HEAD[2] if HEAD[7] else axis_ptr, freq_ptr, db_ptr, dwk_ptr,
            stride_xb, stride_xs, stride_kb, stride_ks, stride_kn * ALIGN,
            stride_pa, stride_pb, stride_ps, axes, tokens, s, columns,
            n, spec_row * (m // ROWS), chunk % k_chunks * BLOCK_H, m // ROWS, scale, eps,
            HEAD, K_NORM, HEAD[7], BIAS, ALIGN, BLOCK_S, BLOCK_H,
        )  # fmt: skip
    else:
        _backward_heads(
            qkv_ptr, dv_ptr, dqkv_ptr, bias_ptr, k_norm_ptr, stats_ptr, pos_ptr, axis_ptr, freq_ptr, db_ptr, dwk_ptr,
            stride_xb, stride_xs, stride_vb, stride_vs, stride_vn * ALIGN,
            stride_pa, stride_pb, stride_ps, axes, tokens, s, columns,
            n + m, 0, (chunk - ROWS * (q_chunks + k_chunks)) * BLOCK_H, m, scale, eps,
            HEAD, NO_NORM, False, BIAS, ALIGN, BLOCK_S, BLOCK_H,
        )  # fmt: skip


def _prepared(qkv, q, k, v, bias, q_norm, k_norm, pos, axis, freq, layout, norm_offset) -> tuple[dict, dict]:
    """What every kernel here takes: numbers of the launch, and what is compiled in. For callers who come past the
    public function, what keeps the kernels inside their tensors is checked."""
    require(len(layout) == 7, NAME, "layout", "have 7 numbers", layout)
    n, m, d, blocks, offset, post, over_all = layout
    require(min(n, m, d) >= 1, NAME, "layout", "hold sizes of at least 1", layout)
    sizes = bind(
        NAME,
        ("qkv", qkv, f"b s {(n + 2 * m) * d}"),
        ("q", q, f"b s {n} {d}"),
        ("k", k, f"b s {m} {d}"),
        ("v", v, f"b s {m} {d}"),
        ("bias", bias, str((n + 2 * m) * d)),
        ("q_norm", q_norm, str(n * d if over_all else d)),
        ("k_norm", k_norm, str(m * d if over_all else d)),
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dtype == qkv.dtype, NAME, name, f"have the dtype of qkv ({qkv.dtype})", x.dtype, TypeError)
        require(
            x.stride(-1) == 1 or d == 1 or not x.numel(), NAME, name, "have stride 1 in its last dimension", x.stride()
        )
    for name, x in (("bias", bias), ("q_norm", q_norm), ("k_norm", k_norm)):
        good = x is None or (x.dtype in (torch.float32, qkv.dtype) and x.is_contiguous())
        require(good, NAME, name, "be contiguous float32, or as qkv", "" if x is None else x.dtype, TypeError)
    turns = pos is not None
    if turns:
        a = bind(NAME, ("qkv", qkv, "b s c"), ("pos", pos, "a b|1 s"), ("axis", axis, "h r"), ("freq", freq, "r"))
        rows, pairs, axes = a["h"], a["r"], a["a"]
        fits = offset >= 0 and blocks >= 0 and offset + 2 * pairs <= d and pairs % max(blocks, 1) == 0
        require(fits, NAME, "layout", f"rotate {2 * pairs} of d={d} elements", layout)
        heads_fit = rows > 0 and n % rows == 0 and m % rows == 0
        require(heads_fit, NAME, "axis", f"have a divisor of n={n} and m={m} heads", rows)
        pos_strides = [pos.stride(0), 0 if pos.shape[1] == 1 else pos.stride(1), pos.stride(2), axes]
    else:
        rows, pairs, blocks, offset, pos_strides = 1, d // 2, 0, 0, [0, 0, 0, 0]
    padded = power_of_2(max(pairs, 1))
    head = (d, offset, pairs, padded, blocks, power_of_2(d), 2 * pairs < d, turns)
    norm = (True, bool(post), bool(over_all), float(norm_offset))
    norms = [norm if x is not None else NO_NORM.value for x in (q_norm, k_norm)]
    strides = [*qkv.stride()[:2], *(stride for x in (q, k, v) for stride in x.stride()[:3])]
    align = alignment(strides)
    b, s = sizes["b"], sizes["s"]
    numbers = {
        "strides": [stride // align for stride in strides],
        "pos_strides": pos_strides,
        "sizes": [b * s, max(s, 1), n, m],
    }
    fixed = {"HEAD": head, "Q_NORM": norms[0], "K_NORM": norms[1], "BIAS": bias is not None, "ROWS": rows}
    return numbers, fixed | {"ALIGN": align}


def _plan(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, layout, norm_offset) -> Callable[..., Tensor]:
    """What gives q [b, s, n, d] and writes k and v, for such tensors."""
    qkv = unit_stride(qkv)
    shape = (*qkv.shape[:2], layout[0], layout[2])
    q = qkv.new_empty(shape)
    given, fixed = _prepared(qkv, q, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, layout, norm_offset)
    here = dict(tiles(NAME, "_qkv_prologue_kernel", arch(qkv.device), d=layout[2], bytes=qkv.element_size()))
    tokens, _, n, m = given["sizes"]
    rows, wide = fixed["ROWS"], here["BLOCK_H"]
    blocks, chunks = (
        cdiv(tokens, here["BLOCK_S"]),
        rows * (cdiv(n // rows, wide) + cdiv(m // rows, wide)) + cdiv(m, wide),
    )
    # Few tokens share their heads among programs, which costs angles once more each; many keep them in one.
    splits = min(chunks, max(here.pop("PROGRAMS") // max(blocks, 1), 1))
    numbers = (*given["strides"], *given["pos_strides"], *given["sizes"], splits)
    meta = {**fixed, **here}

    def run(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps) -> Tensor:
        q = qkv.new_empty(shape)
        launch(
            _qkv_prologue_kernel, (blocks, splits), unit_stride(qkv), q, k_out, v_out, bias, q_norm, k_norm,
            pos, axis, freq, *numbers, scale, eps, **meta,
        )  # fmt: skip
        return q

    return run


@planned
def into(
    qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0
) -> Callable[..., Tensor]:
    run = _plan(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, layout, norm_offset)
    return lambda *args: run(*args[:11])


@planned
def out_of_place(
    qkv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0
) -> Callable[..., tuple[Tensor, ...]]:
    require(len(layout) == 7, NAME, "layout", "have 7 numbers", layout)
    shape = (*qkv.shape[:2], layout[1], layout[2])
    made = qkv.new_empty(shape)
    into = _plan(qkv, made, made, bias, q_norm, k_norm, pos, axis, freq, layout, norm_offset)

    def run(qkv, *rest) -> tuple[Tensor, Tensor, Tensor]:
        k, v = qkv.new_empty(shape), qkv.new_empty(shape)
        return into(qkv, k, v, *rest[:8]), k, v

    return run


@planned
def backward(
    qkv, dq, dk, dv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0
) -> Callable[..., Any]:
    """Gradients of qkv, bias, q_norm, k_norm. Sums over tokens are made of partial ones over fixed shares of the
    tokens, added in order: the same bits whatever the timing."""
    qkv, dq, dk, dv = map(unit_stride, (qkv, dq, dk, dv))
    given, fixed = _prepared(qkv, dq, dk, dv, bias, q_norm, k_norm, pos, axis, freq, layout, norm_offset)
    tokens, s, n, m = given["sizes"]
    d, over_all = layout[2], bool(layout[6])
    chip, size = arch(qkv.device), qkv.element_size()
    whole = over_all and (q_norm is not None or k_norm is not None)
    stats_here = tiles(NAME, "_norm_stats_kernel", chip, d=d, bytes=size) if whole else {"BLOCK_S": 1}
    stats_grid, stats_meta = (cdiv(tokens, stats_here["BLOCK_S"]),), {**fixed, **stats_here}
    stats_numbers = (*given["strides"][:8], *given["pos_strides"], tokens, s, n, m)
    here = dict(tiles(NAME, "_qkv_prologue_bwd_kernel", chip, d=d, bytes=size))
    rows, wide = fixed["ROWS"], here["BLOCK_H"]
    chunks = rows * (cdiv(n // rows, wide) + cdiv(m // rows, wide)) + cdiv(m, wide)
    parts = min(cdiv(tokens, here["BLOCK_S"]), max(here.pop("PROGRAMS") // chunks, 1))
    columns = [0 if x is None else heads * d for x, heads in ((bias, n + 2 * m), (q_norm, n), (k_norm, m))]
    numbers = (*given["strides"], *given["pos_strides"], tokens, s, n, m, sum(columns))
    meta = {**fixed, **here}

    def run(qkv, dq, dk, dv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, *_: Any) -> tuple[Tensor, ...]:
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        qkv, dq, dk, dv = map(unit_stride, (qkv, dq, dk, dv))
        stats = None
        if whole:
            stats = qkv.new_empty((tokens, 4), dtype=torch.float32)
            launch(
                _norm_stats_kernel, stats_grid, qkv, dq, dk, bias, q_norm, k_norm, pos, axis, freq, stats,
                *stats_numbers, scale, eps, **stats_meta,
            )  # fmt: skip
        partial = qkv.new_empty((parts, sum(columns)), dtype=torch.float32)
        launch(
            _qkv_prologue_bwd_kernel, (parts, chunks), qkv, dq, dk, dv, dqkv, bias, q_norm, k_norm, stats, pos, axis,
            freq, partial, *numbers, scale, eps, **meta,
        )  # fmt: skip
        sums = [x.sum(0) for x in partial.split(columns, 1)]
        if not over_all:
            sums[1:] = [x.view(-1, d).sum(0) if x.numel() else x for x in sums[1:]]
        return dqkv, *sums

    return run
