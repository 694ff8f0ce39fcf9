"""Sequences longer than a tile, or that share a CLS token: tiles of queries over tiles of keys.

A shared CLS lies outside the tiles, so that 257 = 1 + 256 tokens leave none of them half empty. As a key it is one more
column: the softmax starts from its score. As a query it is one more program per sequence and head, next to those that
read the same keys (triton_cls.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vkernels.ops.divided_attention.triton_cls import cls_query_bwd, cls_query_fwd, cls_query_on_keys
from vkernels.triton.head import load_head, mix, scores, store_head, zero_head
from vkernels.triton.row import load_row, row_mix, row_scores, row_spread, store_row
from vkernels.triton.sequences import first_row, token_rows
from vkernels.triton.softmax import LOG2E, normalise, softmax_step

# What grows with the number of tokens must not be specialised on, or every length would compile anew.
GROWS = [
    "slots", "outer_count", "inner_count", "length",
    "first", "run", "stride_outer", "stride_inner", "stride_run", "stride_token",
    "stride_qb", "stride_kb", "stride_vb", "stride_ob", "stride_gb", "stride_dqb", "stride_dkb", "stride_dvb",
]  # fmt: skip


@triton.jit
def _place(slots, heads, outer_count, inner_count):
    """(slot, head, sequence, sample, outer, inner) of a program; the slots of one sequence and head are neighbours."""
    program = tl.program_id(0)
    sequence = program // slots // heads
    of_sample = sequence % (outer_count * inner_count)
    sample = (sequence // (outer_count * inner_count)).to(tl.int64)
    return (
        program % slots, program // slots % heads, sequence, sample, of_sample // inner_count, of_sample % inner_count,
    )  # fmt: skip


@triton.jit
def _key_tile(
    q_a, q_b, k_ptr, v_ptr, k_at, v_at, stride_ks, stride_vs, start, length, run, stride_run, stride_token,
    scale, top, total, acc_a, acc_b,
    RUNS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys in the online softmax of a tile of queries; WHOLE: no key lies past the end."""
    j = start + tl.arange(0, BLOCK_N)
    live = tl.full([BLOCK_N], True, tl.int1) if WHOLE else j < length
    token = token_rows(j, run, stride_run, stride_token, RUNS)
    k_a, k_b = load_head(k_ptr, k_at + token * stride_ks, live, D, A, B)
    v_a, v_b = load_head(v_ptr, v_at + token * stride_vs, live, D, A, B)
    s = scores(q_a, q_b, k_a, k_b, B) * scale
    if not WHOLE:
        s = tl.where(live[None, :], s, float("-inf"))
    p, keep, top, total = softmax_step(s, top, total)
    acc_a *= keep[:, None]
    if B > 0:
        acc_b *= keep[:, None]
    acc_a, acc_b = mix(p, v_a, v_b, acc_a, acc_b, B)
    return top, total, acc_a, acc_b


@triton.jit(do_not_specialize=GROWS)
def _long_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, part_ptr,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_ob, stride_os, stride_on,
    scale, n, slots, outer_count, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot, head, _, sample, outer, inner = _place(slots, n, outer_count, inner_count)
    base = first_row(outer, inner, first, stride_outer, stride_inner)
    q_cls = (sample * stride_qb + head * stride_qn) * ALIGN
    k_cls = (sample * stride_kb + head // PER_KEY * stride_kn) * ALIGN
    v_cls = (sample * stride_vb + head // PER_KEY * stride_vn) * ALIGN
    stride_ks *= ALIGN
    stride_vs *= ALIGN
    k_at, v_at = k_cls + base * stride_ks, v_cls + base * stride_vs
    scale *= LOG2E
    if slot < slots - CLS:
        i = slot * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i < length
        token = base + token_rows(i, run, stride_run, stride_token, RUNS)
        q_a, q_b = load_head(q_ptr, q_cls + token * (stride_qs * ALIGN), live, D, A, B)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc_a, acc_b = zero_head(BLOCK_M, A, B)
        if CLS:
            kc_a, kc_b = load_row(k_ptr, k_cls, D, A, B)
            vc_a, vc_b = load_row(v_ptr, v_cls, D, A, B)
            top = row_scores(q_a, q_b, kc_a, kc_b, B) * scale
            total += 1.0
            acc_a, acc_b = row_spread(total, vc_a, vc_b, acc_a, acc_b, B)
        whole = length // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            top, total, acc_a, acc_b = _key_tile(
                q_a, q_b, k_ptr, v_ptr, k_at, v_at, stride_ks, stride_vs, start, length, run, stride_run, stride_token,
                scale, top, total, acc_a, acc_b, RUNS, D, A, B, BLOCK_N, True,
            )  # fmt: skip
        if whole < length:
            top, total, acc_a, acc_b = _key_tile(
                q_a, q_b, k_ptr, v_ptr, k_at, v_at, stride_ks, stride_vs, whole, length, run, stride_run, stride_token,
                scale, top, total, acc_a, acc_b, RUNS, D, A, B, BLOCK_N, False,
            )  # fmt: skip
        o_at = (sample * stride_ob + token * stride_os + head * stride_on) * ALIGN
        store_head(o_ptr, o_at, live, normalise(acc_a, total), normalise(acc_b, total), D, A, B)
    else:
        if CLS:
            part = (sample * n + head) * outer_count + outer
            cls_query_fwd(
                q_ptr + q_cls, k_ptr, v_ptr, part_ptr + part * D, k_cls, v_cls, k_at, v_at, stride_ks, stride_vs,
                length, run, stride_run, stride_token, scale, outer_count, RUNS, D, A, B, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=GROWS)
def _long_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, stats_ptr, cls_stats_ptr, dq_part_ptr, dk_part_ptr, dv_part_ptr,
    stride_gb, stride_gs, stride_gn, stride_qb, stride_qs, stride_qn,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn, stride_dqb, stride_dqs, stride_dqn,
    scale, n, slots, outer_count, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and what the other gradients need: per query its normaliser (base 2) and the sum of p * dp over its keys, found
    in a first walk over the keys. With a CLS, the rows its k and v receive from these queries."""
    slot, head, sequence, sample, outer, inner = _place(slots, n, outer_count, inner_count)
    base = first_row(outer, inner, first, stride_outer, stride_inner)
    g_cls = (sample * stride_gb + head * stride_gn) * ALIGN
    q_cls = (sample * stride_qb + head * stride_qn) * ALIGN
    k_cls = (sample * stride_kb + head // PER_KEY * stride_kn) * ALIGN
    v_cls = (sample * stride_vb + head // PER_KEY * stride_vn) * ALIGN
    stride_ks *= ALIGN
    stride_vs *= ALIGN
    k_at, v_at = k_cls + base * stride_ks, v_cls + base * stride_vs
    part = (sample * n + head) * outer_count + outer
    if slot < slots - CLS:
        i = slot * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i < length
        token = base + token_rows(i, run, stride_run, stride_token, RUNS)
        g_a, g_b = load_head(g_ptr, g_cls + token * (stride_gs * ALIGN), live, D, A, B)
        q_a, q_b = load_head(q_ptr, q_cls + token * (stride_qs * ALIGN), live, D, A, B)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M], tl.float32)
        if CLS:
            kc_a, kc_b = load_row(k_ptr, k_cls, D, A, B)
            vc_a, vc_b = load_row(v_ptr, v_cls, D, A, B)
            cls_s = row_scores(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
            cls_dp = row_scores(g_a, g_b, vc_a, vc_b, B)
            top, total, mixed = cls_s, total + 1.0, cls_dp
        for start in range(0, length, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            at = token_rows(j, run, stride_run, stride_token, RUNS)
            k_a, k_b = load_head(k_ptr, k_at + at * stride_ks, j < length, D, A, B)
            v_a, v_b = load_head(v_ptr, v_at + at * stride_vs, j < length, D, A, B)
            s = scores(q_a, q_b, k_a, k_b, B) * (scale * LOG2E)
            s = tl.where((j < length)[None, :], s, float("-inf"))
            p, keep, top, total = softmax_step(s, top, total)
            mixed = mixed * keep + tl.sum(p * scores(g_a, g_b, v_a, v_b, B), 1)
        lse = top + tl.log2(total)
        delta = mixed / total
        stats = (sequence.to(tl.int64) * n + head) * length + i
        tl.store(stats_ptr + 2 * stats, lse, mask=live)
        tl.store(stats_ptr + 2 * stats + 1, delta, mask=live)
        dq_a, dq_b = zero_head(BLOCK_M, A, B)
        if CLS:
            cls_p = tl.where(live, tl.exp2(cls_s - lse), 0.0)
            cls_ds = cls_p * (cls_dp - delta)
            dq_a, dq_b = row_spread(cls_ds, kc_a, kc_b, dq_a, dq_b, B)
            to = (part * slots + slot) * D
            dk_a, dk_b = row_mix(cls_ds * scale, q_a, q_b, kc_a * 0.0, kc_b * 0.0, B)
            dv_a, dv_b = row_mix(cls_p, g_a, g_b, vc_a * 0.0, vc_b * 0.0, B)
            store_row(dk_part_ptr, to, dk_a, dk_b, D, A, B)
            store_row(dv_part_ptr, to, dv_a, dv_b, D, A, B)
        for start in range(0, length, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            at = token_rows(j, run, stride_run, stride_token, RUNS)
            k_a, k_b = load_head(k_ptr, k_at + at * stride_ks, j < length, D, A, B)
            v_a, v_b = load_head(v_ptr, v_at + at * stride_vs, j < length, D, A, B)
            s = scores(q_a, q_b, k_a, k_b, B) * (scale * LOG2E)
            p = tl.where((j < length)[None, :], tl.exp2(s - lse[:, None]), 0.0)
            ds = p * (scores(g_a, g_b, v_a, v_b, B) - delta[:, None])
            dq_a, dq_b = mix(ds, k_a, k_b, dq_a, dq_b, B)
        dq_at = (sample * stride_dqb + token * stride_dqs + head * stride_dqn) * ALIGN
        store_head(dq_ptr, dq_at, live, dq_a * scale, dq_b * scale, D, A, B)
    else:
        if CLS:
            to = (part * slots + slot) * D
            cls_query_bwd(
                g_ptr + g_cls, q_ptr + q_cls, k_ptr, v_ptr, cls_stats_ptr + 2 * part, dq_part_ptr + part * D,
                dk_part_ptr + to, dv_part_ptr + to, k_cls, v_cls, k_at, v_at, stride_ks, stride_vs,
                length, run, stride_run, stride_token, scale, outer_count, RUNS, D, A, B, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=GROWS)
def _long_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, stats_ptr, cls_stats_ptr,
    stride_gb, stride_gs, stride_gn, stride_qb, stride_qs, stride_qn,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_dkb, stride_dks, stride_dkn, stride_dvb, stride_dvs, stride_dvn,
    scale, m, slots, outer_count, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from all queries of the heads they serve. Tiles are transposed: [keys, queries]."""
    slot, key, sequence, sample, outer, inner = _place(slots, m, outer_count, inner_count)
    n = m * PER_KEY
    base = first_row(outer, inner, first, stride_outer, stride_inner)
    j = slot * BLOCK_N + tl.arange(0, BLOCK_N)
    live = j < length
    token = base + token_rows(j, run, stride_run, stride_token, RUNS)
    k_a, k_b = load_head(k_ptr, (sample * stride_kb + token * stride_ks + key * stride_kn) * ALIGN, live, D, A, B)
    v_a, v_b = load_head(v_ptr, (sample * stride_vb + token * stride_vs + key * stride_vn) * ALIGN, live, D, A, B)
    dk_a, dk_b = zero_head(BLOCK_N, A, B)
    dv_a, dv_b = zero_head(BLOCK_N, A, B)
    stride_gs *= ALIGN
    stride_qs *= ALIGN
    for head in range(key * PER_KEY, key * PER_KEY + PER_KEY):
        g_at = (sample * stride_gb + head * stride_gn) * ALIGN
        q_at = (sample * stride_qb + head * stride_qn) * ALIGN
        if CLS:
            cls_stats = ((sample * n + head) * outer_count + outer) * 2
            dk_a, dk_b, dv_a, dv_b = cls_query_on_keys(
                g_ptr + g_at, q_ptr + q_at, cls_stats_ptr + cls_stats, k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b,
                scale, outer_count, D, A, B,
            )  # fmt: skip
        stats = (sequence.to(tl.int64) * n + head) * length
        for start in range(0, length, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            at = base + token_rows(i, run, stride_run, stride_token, RUNS)
            q_a, q_b = load_head(q_ptr, q_at + at * stride_qs, i < length, D, A, B)
            g_a, g_b = load_head(g_ptr, g_at + at * stride_gs, i < length, D, A, B)
            lse = tl.load(stats_ptr + 2 * (stats + i), mask=i < length, other=float("inf"))  # past the end: p = 0
            delta = tl.load(stats_ptr + 2 * (stats + i) + 1, mask=i < length, other=0.0)
            p = tl.exp2(scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E) - lse[None, :])
            dv_a, dv_b = mix(p, g_a, g_b, dv_a, dv_b, B)
            ds = p * (scores(v_a, v_b, g_a, g_b, B) - delta[None, :])
            dk_a, dk_b = mix(ds, q_a, q_b, dk_a, dk_b, B)
    dk_at = (sample * stride_dkb + token * stride_dks + key * stride_dkn) * ALIGN
    dv_at = (sample * stride_dvb + token * stride_dvs + key * stride_dvn) * ALIGN
    store_head(dk_ptr, dk_at, live, dk_a * scale, dk_b * scale, D, A, B)
    store_head(dv_ptr, dv_at, live, dv_a, dv_b, D, A, B)
