"""Sequences no longer than a tile, packed: as many as fit, one head at a time, one load of everything, one pass.

The scores of a tile are block-diagonal: rows of other sequences are masked. That wastes products where memory is the
limit, and no memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vkernels.triton.head import load_head, mix, scores, store_head, zero_head
from vkernels.triton.sequences import pack, token_rows
from vkernels.triton.softmax import LOG2E, normalise, softmax_step

# What grows with the number of tokens must not be specialised on, or every length would compile anew. Nor do heads pay.
GROWS = [
    "n", "m", "sequences", "per_sample", "inner_count", "length",
    "first", "run", "stride_outer", "stride_inner", "stride_run", "stride_token",
    "stride_qb", "stride_kb", "stride_vb", "stride_ob", "stride_gb", "stride_dqb", "stride_dkb", "stride_dvb",
]  # fmt: skip


@triton.jit
def _zero_cls(ptr, stride_b, head_at, start, end, per_sample, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The CLS row of every sample whose first sequence is one of start .. end: it belongs to none, and is 0."""
    sample = (start + per_sample - 1) // per_sample
    while sample * per_sample < end:
        at = sample.to(tl.int64) * stride_b + head_at + tl.zeros([1], tl.int64)
        zero_a, zero_b = zero_head(1, A, B)
        store_head(ptr, at, at == at, zero_a, zero_b, D, A, B)
        sample += 1


@triton.jit
def _weights(q_a, q_b, k_a, k_b, slot, live, scale, B: tl.constexpr, ROWS: tl.constexpr):
    """exp(scores - top of the row) of a packed tile, 0 between sequences, and the sum of each row."""
    seen = (slot[:, None] == slot[None, :]) & live[None, :]
    s = tl.where(seen, scores(q_a, q_b, k_a, k_b, B) * (scale * LOG2E), float("-inf"))
    nothing = tl.zeros([ROWS], tl.float32)
    p, _, _, total = softmax_step(s, nothing - float("inf"), nothing)
    return p, total


@triton.jit(do_not_specialize=GROWS)
def _short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_ob, stride_os, stride_on,
    scale, n, sequences, per_sample, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0) // n, tl.program_id(0) % n
    slot, sequence, i, live = pack(tile, length, sequences, ROWS)
    sample, of_sample = sequence // per_sample, sequence % per_sample
    outer, inner = of_sample // inner_count, of_sample % inner_count
    if WIDE:
        sample, outer, inner = sample.to(tl.int64), outer.to(tl.int64), inner.to(tl.int64)
    token = first + outer * stride_outer + inner * stride_inner
    token += token_rows(i, run, stride_run, stride_token, RUNS, WIDE)
    key = head // PER_KEY
    q_at = (sample * stride_qb + token * stride_qs + head * stride_qn) * ALIGN
    k_at = (sample * stride_kb + token * stride_ks + key * stride_kn) * ALIGN
    v_at = (sample * stride_vb + token * stride_vs + key * stride_vn) * ALIGN
    o_at = (sample * stride_ob + token * stride_os + head * stride_on) * ALIGN
    q_a, q_b = load_head(q_ptr, q_at, live, D, A, B)
    k_a, k_b = load_head(k_ptr, k_at, live, D, A, B)
    v_a, v_b = load_head(v_ptr, v_at, live, D, A, B)
    p, total = _weights(q_a, q_b, k_a, k_b, slot, live, scale, B, ROWS)
    o_a, o_b = zero_head(ROWS, A, B)
    o_a, o_b = mix(p, v_a, v_b, o_a, o_b, B)
    store_head(o_ptr, o_at, live, normalise(o_a, total), normalise(o_b, total), D, A, B)
    if CLS:
        start = tile * (ROWS // length)
        end = tl.minimum(start + ROWS // length, sequences)
        _zero_cls(o_ptr, stride_ob * ALIGN, head * stride_on * ALIGN, start, end, per_sample, D, A, B)


@triton.jit(do_not_specialize=GROWS)
def _short_bwd_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gs, stride_gn, stride_qb, stride_qs, stride_qn,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_dqb, stride_dqs, stride_dqn, stride_dkb, stride_dks, stride_dkn, stride_dvb, stride_dvs, stride_dvn,
    scale, m, sequences, per_sample, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, key = tl.program_id(0) // m, tl.program_id(0) % m
    slot, sequence, i, live = pack(tile, length, sequences, ROWS)
    sample, of_sample = sequence // per_sample, sequence % per_sample
    outer, inner = of_sample // inner_count, of_sample % inner_count
    if WIDE:
        sample, outer, inner = sample.to(tl.int64), outer.to(tl.int64), inner.to(tl.int64)
    token = first + outer * stride_outer + inner * stride_inner
    token += token_rows(i, run, stride_run, stride_token, RUNS, WIDE)
    start = tile * (ROWS // length)
    end = tl.minimum(start + ROWS // length, sequences)
    k_a, k_b = load_head(k_ptr, (sample * stride_kb + token * stride_ks + key * stride_kn) * ALIGN, live, D, A, B)
    v_a, v_b = load_head(v_ptr, (sample * stride_vb + token * stride_vs + key * stride_vn) * ALIGN, live, D, A, B)
    dk_a, dk_b = zero_head(ROWS, A, B)
    dv_a, dv_b = zero_head(ROWS, A, B)
    for j in range(PER_KEY):
        head = key * PER_KEY + j
        q_a, q_b = load_head(q_ptr, (sample * stride_qb + token * stride_qs + head * stride_qn) * ALIGN, live, D, A, B)
        g_a, g_b = load_head(g_ptr, (sample * stride_gb + token * stride_gs + head * stride_gn) * ALIGN, live, D, A, B)
        p, total = _weights(q_a, q_b, k_a, k_b, slot, live, scale, B, ROWS)
        p = normalise(p, total)
        dv_a, dv_b = mix(tl.trans(p.to(g_a.dtype)), g_a, g_b, dv_a, dv_b, B)
        dp = scores(g_a, g_b, v_a, v_b, B)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q_a.dtype)
        dk_a, dk_b = mix(tl.trans(ds), q_a, q_b, dk_a, dk_b, B)
        dq_a, dq_b = zero_head(ROWS, A, B)
        dq_a, dq_b = mix(ds, k_a, k_b, dq_a, dq_b, B)
        dq_at = (sample * stride_dqb + token * stride_dqs + head * stride_dqn) * ALIGN
        store_head(dq_ptr, dq_at, live, dq_a * scale, dq_b * scale, D, A, B)
        if CLS:
            _zero_cls(dq_ptr, stride_dqb * ALIGN, head * stride_dqn * ALIGN, start, end, per_sample, D, A, B)
    dk_at = (sample * stride_dkb + token * stride_dks + key * stride_dkn) * ALIGN
    dv_at = (sample * stride_dvb + token * stride_dvs + key * stride_dvn) * ALIGN
    store_head(dk_ptr, dk_at, live, dk_a * scale, dk_b * scale, D, A, B)
    store_head(dv_ptr, dv_at, live, dv_a, dv_b, D, A, B)
    if CLS:
        _zero_cls(dk_ptr, stride_dkb * ALIGN, key * stride_dkn * ALIGN, start, end, per_sample, D, A, B)
        _zero_cls(dv_ptr, stride_dvb * ALIGN, key * stride_dvn * ALIGN, start, end, per_sample, D, A, B)
