"""The CLS token that all sequences share: one softmax per sequence, its outputs averaged.

What each sequence owes to the CLS's output and gradients it leaves as a row of float32, and `_cls_sum_kernel` adds them
in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vkernels.triton.head import load_head, zero_head
from vkernels.triton.sequences import token_rows
from vkernels.triton.single import load_row, row_dot, row_mix, row_scores, row_spread, store_row
from vkernels.triton.softmax import LOG2E


@triton.jit
def _cls_step(s, top, total):
    """One tile of scores [keys] in the online softmax of one query: weights, scale of earlier sums, new top, total."""
    new_top = tl.maximum(top, tl.max(s, 0))
    keep = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top)
    return p, keep, new_top, total * keep + tl.sum(p, 0)


@triton.jit
def cls_as_query_fwd(
    q_ptr, k_ptr, v_ptr, part_ptr, k_first, v_first, stride_ks, stride_vs,
    length, run, stride_run, stride_token, scale, outer_count,
    RUNS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave the CLS's output over itself and one sequence, divided by how many sequences there are."""
    q_a, q_b = load_row(q_ptr, D, A, B)
    kc_a, kc_b = load_row(k_ptr, D, A, B)
    o_a, o_b = load_row(v_ptr, D, A, B)
    top = row_dot(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
    total = top * 0.0 + 1.0
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
        k_a, k_b = load_head(k_first, token * stride_ks, j < length, D, A, B)
        v_a, v_b = load_head(v_first, token * stride_vs, j < length, D, A, B)
        s = tl.where(j < length, row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E), float("-inf"))
        p, keep, top, total = _cls_step(s, top, total)
        o_a *= keep
        if B > 0:
            o_b *= keep
        o_a, o_b = row_mix(p, v_a, v_b, o_a, o_b, B)
    share = 1.0 / (total * outer_count)
    store_row(part_ptr, o_a * share, o_b * share, D, A, B)


@triton.jit
def cls_as_query_bwd(
    g_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dq_part_ptr, k_first, v_first, stride_ks, stride_vs,
    length, run, stride_run, stride_token, scale, outer_count,
    RUNS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave the CLS's dq from one sequence, its normaliser (base 2) and its sum of p * dp."""
    g_a, g_b = load_row(g_ptr, D, A, B)
    g_a, g_b = g_a / outer_count, g_b / outer_count
    q_a, q_b = load_row(q_ptr, D, A, B)
    kc_a, kc_b = load_row(k_ptr, D, A, B)
    vc_a, vc_b = load_row(v_ptr, D, A, B)
    own_s = row_dot(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
    own_dp = row_dot(g_a, g_b, vc_a, vc_b, B)
    top, mixed = own_s, own_dp
    total = own_s * 0.0 + 1.0
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
        k_a, k_b = load_head(k_first, token * stride_ks, j < length, D, A, B)
        v_a, v_b = load_head(v_first, token * stride_vs, j < length, D, A, B)
        s = tl.where(j < length, row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E), float("-inf"))
        p, keep, top, total = _cls_step(s, top, total)
        mixed = mixed * keep + tl.sum(p * row_scores(v_a, v_b, g_a, g_b, B), 0)
    lse = top + tl.log2(total)
    delta = mixed / total
    tl.store(stats_ptr, lse)
    tl.store(stats_ptr + 1, delta)
    own_ds = tl.exp2(own_s - lse) * (own_dp - delta)
    dq_a, dq_b = own_ds * kc_a, own_ds * kc_b
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token = token_rows(j, run, stride_run, stride_token, RUNS, WIDE)
        k_a, k_b = load_head(k_first, token * stride_ks, j < length, D, A, B)
        v_a, v_b = load_head(v_first, token * stride_vs, j < length, D, A, B)
        s = row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E)
        p = tl.where(j < length, tl.exp2(s - lse), 0.0)
        dq_a, dq_b = row_mix(p * (row_scores(v_a, v_b, g_a, g_b, B) - delta), k_a, k_b, dq_a, dq_b, B)
    store_row(dq_part_ptr, dq_a * scale, dq_b * scale, D, A, B)


@triton.jit
def cls_to_keys(
    g_ptr, q_ptr, stats_ptr, k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, scale, outer_count,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Add what a tile of keys and values receives from the CLS as a query; dk without its factor `scale`."""
    g_a, g_b = load_row(g_ptr, D, A, B)
    g_a, g_b = g_a / outer_count, g_b / outer_count
    q_a, q_b = load_row(q_ptr, D, A, B)
    p = tl.exp2(row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E) - tl.load(stats_ptr))
    ds = p * (row_scores(v_a, v_b, g_a, g_b, B) - tl.load(stats_ptr + 1))
    dk_a, dk_b = row_spread(ds, q_a, q_b, dk_a, dk_b, B)
    dv_a, dv_b = row_spread(p, g_a, g_b, dv_a, dv_b, B)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit
def cls_as_key_bwd(
    g_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, cls_stats_ptr, dk_part_ptr, dv_part_ptr,
    base, stride_gs, stride_qs, stride_gn, stride_qn, length, run, stride_run, stride_token, scale, outer_count,
    PER_KEY: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave what the CLS's k and v receive from one sequence and from the CLS itself, all heads they serve."""
    kc_a, kc_b = load_row(k_ptr, D, A, B)
    vc_a, vc_b = load_row(v_ptr, D, A, B)
    dk_a, dk_b = kc_a * 0.0, kc_b * 0.0
    dv_a, dv_b = dk_a, dk_b
    for _ in range(PER_KEY):
        own_g_a, own_g_b = load_row(g_ptr, D, A, B)
        own_g_a, own_g_b = own_g_a / outer_count, own_g_b / outer_count
        own_q_a, own_q_b = load_row(q_ptr, D, A, B)
        own_p = tl.exp2(row_dot(own_q_a, own_q_b, kc_a, kc_b, B) * (scale * LOG2E) - tl.load(cls_stats_ptr))
        own_ds = own_p * (row_dot(own_g_a, own_g_b, vc_a, vc_b, B) - tl.load(cls_stats_ptr + 1))
        dk_a += own_ds * own_q_a
        dv_a += own_p * own_g_a
        if B > 0:
            dk_b += own_ds * own_q_b
            dv_b += own_p * own_g_b
        for start in range(0, length, BLOCK):
            i = start + tl.arange(0, BLOCK)
            token = token_rows(i, run, stride_run, stride_token, RUNS, WIDE)
            q_a, q_b = load_head(q_ptr + base * stride_qs, token * stride_qs, i < length, D, A, B)
            g_a, g_b = load_head(g_ptr + base * stride_gs, token * stride_gs, i < length, D, A, B)
            lse = tl.load(stats_ptr + 2 * i, mask=i < length, other=float("inf"))  # past the end: p = 0
            delta = tl.load(stats_ptr + 2 * i + 1, mask=i < length, other=0.0)
            p = tl.exp2(row_scores(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E) - lse)
            ds = p * (row_scores(g_a, g_b, vc_a, vc_b, B) - delta)
            dk_a, dk_b = row_mix(ds, q_a, q_b, dk_a, dk_b, B)
            dv_a, dv_b = row_mix(p, g_a, g_b, dv_a, dv_b, B)
        g_ptr, q_ptr = g_ptr + stride_gn, q_ptr + stride_qn
        stats_ptr, cls_stats_ptr = stats_ptr + 2 * length, cls_stats_ptr + 2 * outer_count
    store_row(dk_part_ptr, dk_a * scale, dk_b * scale, D, A, B)
    store_row(dv_part_ptr, dv_a, dv_b, D, A, B)


@triton.jit
def _cls_sum(
    part_ptr, out_ptr, s, b, heads, count, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    if row < b * heads:
        sum_a, sum_b = zero_head(BLOCK, A, B)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x_a, x_b = load_head(part_ptr, (row.to(tl.int64) * count + i) * D, i < count, D, A, B)
            sum_a += x_a
            if B > 0:
                sum_b += x_b
        at = (row // heads).to(tl.int64) * s * heads + row % heads
        store_row(out_ptr + at * D, tl.sum(sum_a, 0), tl.sum(sum_b, 0), D, A, B)


@triton.jit(do_not_specialize=["s", "b", "count"])
def _cls_sum_kernel(
    part_0_ptr, part_1_ptr, part_2_ptr, out_0_ptr, out_1_ptr, out_2_ptr, s, b, n, m, count,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The CLS rows of o, or of dq, dk and dv: the sum of `count` rows per sample and head; 0 where count is 0."""
    which = tl.program_id(1)
    if which == 0:
        _cls_sum(part_0_ptr, out_0_ptr, s, b, n, count, D, A, B, BLOCK)
    elif which == 1:
        _cls_sum(part_1_ptr, out_1_ptr, s, b, m, count, D, A, B, BLOCK)
    else:
        _cls_sum(part_2_ptr, out_2_ptr, s, b, m, count, D, A, B, BLOCK)
