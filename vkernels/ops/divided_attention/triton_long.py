"""Sequences longer than a tile, or that share a CLS token: tiles of queries over tiles of keys.

A shared CLS lies outside the tiles, so that 257 = 1 + 256 tokens leave none of them half empty. As a key it is one more
column: the softmax starts from its score. As a query it is one more program per sequence and head, next to those that
read the same keys. What each sequence owes to the CLS's output and gradients it leaves as rows of float32;
`_cls_sum_kernel` adds them in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vkernels.triton.head import load_head, mix, scores, store_head, zero_head
from vkernels.triton.row import load_row, row_dot, row_mix, row_scores, row_spread, store_row
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
            q_a, q_b = load_row(q_ptr, q_cls, D, A, B)
            kc_a, kc_b = load_row(k_ptr, k_cls, D, A, B)
            o_a, o_b = load_row(v_ptr, v_cls, D, A, B)
            top = row_dot(q_a, q_b, kc_a, kc_b, B) * scale
            total = tl.full([], 1.0, tl.float32)
            for start in range(0, length, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                token = token_rows(j, run, stride_run, stride_token, RUNS)
                k_a, k_b = load_head(k_ptr, k_at + token * stride_ks, j < length, D, A, B)
                v_a, v_b = load_head(v_ptr, v_at + token * stride_vs, j < length, D, A, B)
                s = tl.where(j < length, row_scores(k_a, k_b, q_a, q_b, B) * scale, float("-inf"))
                new_top = tl.maximum(top, tl.max(s, 0))
                keep = tl.exp2(top - new_top)
                p = tl.exp2(s - new_top)
                top = new_top
                total = total * keep + tl.sum(p, 0)
                o_a *= keep
                if B > 0:
                    o_b *= keep
                o_a, o_b = row_mix(p, v_a, v_b, o_a, o_b, B)
            mean = 1.0 / (total * outer_count)
            part = ((sample * n + head) * outer_count + outer) * D
            store_row(part_ptr, part, o_a * mean, o_b * mean, D, A, B)


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
            g_a, g_b = load_row(g_ptr, g_cls, D, A, B)
            g_a, g_b = g_a / outer_count, g_b / outer_count
            q_a, q_b = load_row(q_ptr, q_cls, D, A, B)
            kc_a, kc_b = load_row(k_ptr, k_cls, D, A, B)
            vc_a, vc_b = load_row(v_ptr, v_cls, D, A, B)
            own_s = row_dot(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
            own_dp = row_dot(g_a, g_b, vc_a, vc_b, B)
            own_top, own_mixed = own_s, own_dp
            own_total = tl.full([], 1.0, tl.float32)
            for start in range(0, length, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                at = token_rows(j, run, stride_run, stride_token, RUNS)
                k_a, k_b = load_head(k_ptr, k_at + at * stride_ks, j < length, D, A, B)
                v_a, v_b = load_head(v_ptr, v_at + at * stride_vs, j < length, D, A, B)
                s = tl.where(j < length, row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E), float("-inf"))
                new_top = tl.maximum(own_top, tl.max(s, 0))
                keep = tl.exp2(own_top - new_top)
                p = tl.exp2(s - new_top)
                own_top = new_top
                own_total = own_total * keep + tl.sum(p, 0)
                own_mixed = own_mixed * keep + tl.sum(p * row_scores(v_a, v_b, g_a, g_b, B), 0)
            own_lse = own_top + tl.log2(own_total)
            own_delta = own_mixed / own_total
            tl.store(cls_stats_ptr + 2 * part, own_lse)
            tl.store(cls_stats_ptr + 2 * part + 1, own_delta)
            own_p = tl.exp2(own_s - own_lse)
            own_ds = own_p * (own_dp - own_delta) * scale
            to = (part * slots + slot) * D
            store_row(dk_part_ptr, to, own_ds * q_a, own_ds * q_b, D, A, B)
            store_row(dv_part_ptr, to, own_p * g_a, own_p * g_b, D, A, B)
            own_a, own_b = own_ds * kc_a, own_ds * kc_b
            for start in range(0, length, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                at = token_rows(j, run, stride_run, stride_token, RUNS)
                k_a, k_b = load_head(k_ptr, k_at + at * stride_ks, j < length, D, A, B)
                v_a, v_b = load_head(v_ptr, v_at + at * stride_vs, j < length, D, A, B)
                s = row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E)
                p = tl.where(j < length, tl.exp2(s - own_lse), 0.0)
                ds = p * (row_scores(v_a, v_b, g_a, g_b, B) - own_delta) * scale
                own_a, own_b = row_mix(ds, k_a, k_b, own_a, own_b, B)
            store_row(dq_part_ptr, part * D, own_a, own_b, D, A, B)


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
            qc_a, qc_b = load_row(q_ptr, q_at, D, A, B)
            gc_a, gc_b = load_row(g_ptr, g_at, D, A, B)
            gc_a, gc_b = gc_a / outer_count, gc_b / outer_count
            cls_stats = ((sample * n + head) * outer_count + outer) * 2
            p = tl.exp2(row_scores(k_a, k_b, qc_a, qc_b, B) * (scale * LOG2E) - tl.load(cls_stats_ptr + cls_stats))
            ds = p * (row_scores(v_a, v_b, gc_a, gc_b, B) - tl.load(cls_stats_ptr + cls_stats + 1))
            dk_a, dk_b = row_spread(ds, qc_a, qc_b, dk_a, dk_b, B)
            dv_a, dv_b = row_spread(p, gc_a, gc_b, dv_a, dv_b, B)
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


@triton.jit
def _cls_sum(
    part_ptr, out_ptr, stride_b, heads, count, rows, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row < rows:
        sum_a, sum_b = zero_head(BLOCK, A, B)
        for start in range(0, count, BLOCK):
            r = start + tl.arange(0, BLOCK)
            x_a, x_b = load_head(part_ptr, (row.to(tl.int64) * count + r) * D, r < count, D, A, B)
            sum_a += x_a
            if B > 0:
                sum_b += x_b
        at = (row // heads).to(tl.int64) * stride_b + row % heads * D
        store_row(out_ptr, at, tl.sum(sum_a, 0), tl.sum(sum_b, 0), D, A, B)


@triton.jit(do_not_specialize=["s", "b", "count_0", "count_1"])
def _cls_sum_kernel(
    part_0_ptr, part_1_ptr, part_2_ptr, out_0_ptr, out_1_ptr, out_2_ptr, s, b, heads_0, heads_1, count_0, count_1,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The CLS rows of o, or of dq, dk and dv: sums of `count` consecutive rows per sample and head; 0 where it is 0."""
    which = tl.program_id(1)
    size = s.to(tl.int64) * D
    if which == 0:
        _cls_sum(part_0_ptr, out_0_ptr, size * heads_0, heads_0, count_0, b * heads_0, D, A, B, BLOCK)
    elif which == 1:
        _cls_sum(part_1_ptr, out_1_ptr, size * heads_1, heads_1, count_1, b * heads_1, D, A, B, BLOCK)
    else:
        _cls_sum(part_2_ptr, out_2_ptr, size * heads_1, heads_1, count_1, b * heads_1, D, A, B, BLOCK)
