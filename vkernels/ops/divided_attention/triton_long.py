"""Sequences longer than a tile, or that share a CLS token: tiles of queries over tiles of keys.

A shared CLS lies outside the tiles, so that 257 = 1 + 256 tokens leave none of them half empty. As a key it is one more
column: the softmax starts from its score. Where it is the one that sees, or the one that collects, it is one more
program per sequence and head, next to those that read the same tokens (triton_cls.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vkernels.ops.divided_attention.triton_cls import cls_as_key_bwd, cls_as_query_bwd, cls_as_query_fwd, cls_to_keys
from vkernels.triton.head import load_head, mix, scores, store_head, zero_head
from vkernels.triton.sequences import first_row, token_rows
from vkernels.triton.single import load_row, row_scores, row_spread
from vkernels.triton.softmax import LOG2E, normalise, softmax_step

# What grows with the number of tokens must not be specialised on, or every length would compile anew. Nor do heads pay.
GROWS = [
    "n", "m", "slots", "outer_count", "inner_count", "length",
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
    q_a, q_b, k_ptr, v_ptr, stride_ks, stride_vs, start, length, run, stride_run, stride_token,
    scale, top, total, acc_a, acc_b,
    RUNS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys in the online softmax of a tile of queries; WHOLE: no key lies past the end."""
    j = start + tl.arange(0, BLOCK_N)
    live = tl.full([BLOCK_N], True, tl.int1) if WHOLE else j < length
    token = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
    k_a, k_b = load_head(k_ptr, token * stride_ks, live, D, A, B)
    v_a, v_b = load_head(v_ptr, token * stride_vs, live, D, A, B)
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
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot, head, _, sample, outer, inner = _place(slots, n, outer_count, inner_count)
    base = first_row(outer, inner, first, stride_outer, stride_inner)
    stride_qs, stride_os = stride_qs * ALIGN, stride_os * ALIGN
    stride_ks, stride_vs = stride_ks * ALIGN, stride_vs * ALIGN
    q_ptr += (sample * stride_qb + head * stride_qn) * ALIGN
    k_ptr += (sample * stride_kb + head // PER_KEY * stride_kn) * ALIGN
    v_ptr += (sample * stride_vb + head // PER_KEY * stride_vn) * ALIGN
    o_ptr += (sample * stride_ob + head * stride_on) * ALIGN + base * stride_os
    k_first, v_first = k_ptr + base * stride_ks, v_ptr + base * stride_vs
    if slot < slots - CLS:
        i = slot * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i < length
        token = token_rows(i, run, stride_run, stride_token, RUNS, WIDE)
        q_a, q_b = load_head(q_ptr + base * stride_qs, token * stride_qs, live, D, A, B)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc_a, acc_b = zero_head(BLOCK_M, A, B)
        if CLS:
            kc_a, kc_b = load_row(k_ptr, D, A, B)
            vc_a, vc_b = load_row(v_ptr, D, A, B)
            top = row_scores(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
            total += 1.0
            acc_a, acc_b = row_spread(total, vc_a, vc_b, acc_a, acc_b, B)
        whole = length // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            top, total, acc_a, acc_b = _key_tile(
                q_a, q_b, k_first, v_first, stride_ks, stride_vs, start, length, run, stride_run, stride_token,
                scale * LOG2E, top, total, acc_a, acc_b, RUNS, WIDE, D, A, B, BLOCK_N, True,
            )  # fmt: skip
        if whole < length:
            top, total, acc_a, acc_b = _key_tile(
                q_a, q_b, k_first, v_first, stride_ks, stride_vs, whole, length, run, stride_run, stride_token,
                scale * LOG2E, top, total, acc_a, acc_b, RUNS, WIDE, D, A, B, BLOCK_N, False,
            )  # fmt: skip
        store_head(o_ptr, token * stride_os, live, normalise(acc_a, total), normalise(acc_b, total), D, A, B)
    else:
        if CLS:
            cls_as_query_fwd(
                q_ptr, k_ptr, v_ptr, part_ptr + ((sample * n + head) * outer_count + outer) * D,
                k_first, v_first, stride_ks, stride_vs, length, run, stride_run, stride_token, scale, outer_count,
                RUNS, WIDE, D, A, B, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=GROWS)
def _long_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, stats_ptr, cls_stats_ptr, part_ptr,
    stride_gb, stride_gs, stride_gn, stride_qb, stride_qs, stride_qn,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn, stride_dqb, stride_dqs, stride_dqn,
    scale, n, slots, outer_count, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and what dk and dv need: each query's normaliser (base 2) and sum of p * dp over its keys, from a first walk
    over the keys."""
    slot, head, sequence, sample, outer, inner = _place(slots, n, outer_count, inner_count)
    base = first_row(outer, inner, first, stride_outer, stride_inner)
    stride_gs, stride_qs, stride_dqs = stride_gs * ALIGN, stride_qs * ALIGN, stride_dqs * ALIGN
    stride_ks, stride_vs = stride_ks * ALIGN, stride_vs * ALIGN
    g_ptr += (sample * stride_gb + head * stride_gn) * ALIGN
    q_ptr += (sample * stride_qb + head * stride_qn) * ALIGN
    k_ptr += (sample * stride_kb + head // PER_KEY * stride_kn) * ALIGN
    v_ptr += (sample * stride_vb + head // PER_KEY * stride_vn) * ALIGN
    dq_ptr += (sample * stride_dqb + head * stride_dqn) * ALIGN + base * stride_dqs
    k_first, v_first = k_ptr + base * stride_ks, v_ptr + base * stride_vs
    if slot < slots - CLS:
        i = slot * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i < length
        token = token_rows(i, run, stride_run, stride_token, RUNS, WIDE)
        g_a, g_b = load_head(g_ptr + base * stride_gs, token * stride_gs, live, D, A, B)
        q_a, q_b = load_head(q_ptr + base * stride_qs, token * stride_qs, live, D, A, B)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M], tl.float32)
        if CLS:
            kc_a, kc_b = load_row(k_ptr, D, A, B)
            vc_a, vc_b = load_row(v_ptr, D, A, B)
            cls_s = row_scores(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
            cls_dp = row_scores(g_a, g_b, vc_a, vc_b, B)
            top, total, mixed = cls_s, total + 1.0, cls_dp
        for start in range(0, length, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            at = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
            k_a, k_b = load_head(k_first, at * stride_ks, j < length, D, A, B)
            v_a, v_b = load_head(v_first, at * stride_vs, j < length, D, A, B)
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
            kc_a, kc_b = load_row(k_ptr, D, A, B)
            dq_a, dq_b = row_spread(tl.exp2(cls_s - lse) * (cls_dp - delta), kc_a, kc_b, dq_a, dq_b, B)
        for start in range(0, length, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            at = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
            k_a, k_b = load_head(k_first, at * stride_ks, j < length, D, A, B)
            v_a, v_b = load_head(v_first, at * stride_vs, j < length, D, A, B)
            s = scores(q_a, q_b, k_a, k_b, B) * (scale * LOG2E)
            p = tl.where((j < length)[None, :], tl.exp2(s - lse[:, None]), 0.0)
            ds = p * (scores(g_a, g_b, v_a, v_b, B) - delta[:, None])
            dq_a, dq_b = mix(ds, k_a, k_b, dq_a, dq_b, B)
        store_head(dq_ptr, token * stride_dqs, live, dq_a * scale, dq_b * scale, D, A, B)
    else:
        if CLS:
            part = (sample * n + head) * outer_count + outer
            cls_as_query_bwd(
                g_ptr, q_ptr, k_ptr, v_ptr, cls_stats_ptr + 2 * part, part_ptr + part * D,
                k_first, v_first, stride_ks, stride_vs, length, run, stride_run, stride_token, scale, outer_count,
                RUNS, WIDE, D, A, B, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=GROWS)
def _long_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, stats_ptr, cls_stats_ptr, dk_part_ptr, dv_part_ptr,
    stride_gb, stride_gs, stride_gn, stride_qb, stride_qs, stride_qn,
    stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_dkb, stride_dks, stride_dkn, stride_dvb, stride_dvs, stride_dvn,
    scale, m, slots, outer_count, inner_count, length,
    first, run, stride_outer, stride_inner, stride_run, stride_token,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, CLS: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from all queries of the heads they serve. Tiles are transposed: [keys, queries]."""
    slot, key, sequence, sample, outer, inner = _place(slots, m, outer_count, inner_count)
    base = first_row(outer, inner, first, stride_outer, stride_inner)
    stride_gs, stride_qs = stride_gs * ALIGN, stride_qs * ALIGN
    stride_ks, stride_vs = stride_ks * ALIGN, stride_vs * ALIGN
    g_ptr += (sample * stride_gb + key * PER_KEY * stride_gn) * ALIGN
    q_ptr += (sample * stride_qb + key * PER_KEY * stride_qn) * ALIGN
    k_ptr += (sample * stride_kb + key * stride_kn) * ALIGN
    v_ptr += (sample * stride_vb + key * stride_vn) * ALIGN
    stats_ptr += 2 * ((sequence.to(tl.int64) * m + key) * PER_KEY * length)
    cls_stats = ((sample * m + key) * PER_KEY * outer_count + outer) * 2
    if slot < slots - CLS:
        j = slot * BLOCK_N + tl.arange(0, BLOCK_N)
        live = j < length
        token = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
        k_a, k_b = load_head(k_ptr + base * stride_ks, token * stride_ks, live, D, A, B)
        v_a, v_b = load_head(v_ptr + base * stride_vs, token * stride_vs, live, D, A, B)
        dk_a, dk_b = zero_head(BLOCK_N, A, B)
        dv_a, dv_b = zero_head(BLOCK_N, A, B)
        for _ in range(PER_KEY):
            if CLS:
                dk_a, dk_b, dv_a, dv_b = cls_to_keys(
                    g_ptr, q_ptr, cls_stats_ptr + cls_stats, k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b,
                    scale, outer_count, D, A, B,
                )  # fmt: skip
            q_first, g_first = q_ptr + base * stride_qs, g_ptr + base * stride_gs
            for start in range(0, length, BLOCK_M):
                i = start + tl.arange(0, BLOCK_M)
                at = token_rows(i, run, stride_run, stride_token, RUNS, WIDE)
                q_a, q_b = load_head(q_first, at * stride_qs, i < length, D, A, B)
                g_a, g_b = load_head(g_first, at * stride_gs, i < length, D, A, B)
                lse = tl.load(stats_ptr + 2 * i, mask=i < length, other=float("inf"))  # past the end: p = 0
                delta = tl.load(stats_ptr + 2 * i + 1, mask=i < length, other=0.0)
                p = tl.exp2(scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E) - lse[None, :])
                dv_a, dv_b = mix(p, g_a, g_b, dv_a, dv_b, B)
                ds = p * (scores(v_a, v_b, g_a, g_b, B) - delta[None, :])
                dk_a, dk_b = mix(ds, q_a, q_b, dk_a, dk_b, B)
            g_ptr, q_ptr = g_ptr + stride_gn * ALIGN, q_ptr + stride_qn * ALIGN
            stats_ptr, cls_stats = stats_ptr + 2 * length, cls_stats + 2 * outer_count
        to_k = (sample * stride_dkb + key * stride_dkn + base * stride_dks) * ALIGN
        to_v = (sample * stride_dvb + key * stride_dvn + base * stride_dvs) * ALIGN
        store_head(dk_ptr + to_k, token * (stride_dks * ALIGN), live, dk_a * scale, dk_b * scale, D, A, B)
        store_head(dv_ptr + to_v, token * (stride_dvs * ALIGN), live, dv_a, dv_b, D, A, B)
    else:
        if CLS:
            part = ((sample * m + key) * outer_count + outer) * D
            cls_as_key_bwd(
                g_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, cls_stats_ptr + cls_stats,
                dk_part_ptr + part, dv_part_ptr + part, base,
                stride_gs, stride_qs, stride_gn * ALIGN, stride_qn * ALIGN,
                length, run, stride_run, stride_token, scale, outer_count, PER_KEY, RUNS, WIDE, D, A, B, BLOCK_M,
            )  # fmt: skip
