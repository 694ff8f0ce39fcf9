"""The CLS token that all sequences share, as a query: one softmax per sequence, its outputs averaged.

What each sequence owes to the CLS's output and gradients it leaves as rows of float32, and `_cls_sum_kernel` adds them
in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vkernels.triton.head import load_head, zero_head
from vkernels.triton.row import load_row, row_dot, row_mix, row_scores, row_spread, store_row
from vkernels.triton.sequences import token_rows
from vkernels.triton.softmax import LOG2E


@triton.jit
def cls_query_fwd(
    q_ptr, k_ptr, v_ptr, part_ptr, k_cls, v_cls, k_at, v_at, stride_ks, stride_vs,
    length, run, stride_run, stride_token, scale, outer_count,
    RUNS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Leave the CLS's output over itself and one sequence, divided by how many sequences there are."""
    q_a, q_b = load_row(q_ptr, 0, D, A, B)
    kc_a, kc_b = load_row(k_ptr, k_cls, D, A, B)
    o_a, o_b = load_row(v_ptr, v_cls, D, A, B)
    top = row_dot(q_a, q_b, kc_a, kc_b, B) * scale
    total = 1.0
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
    store_row(part_ptr, 0, o_a * mean, o_b * mean, D, A, B)


@triton.jit
def cls_query_bwd(
    g_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dq_part_ptr, dk_part_ptr, dv_part_ptr,
    k_cls, v_cls, k_at, v_at, stride_ks, stride_vs,
    length, run, stride_run, stride_token, scale, outer_count,
    RUNS: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Leave the CLS's dq from one sequence, its dk and dv from itself, and its normaliser and sum of p * dp."""
    g_a, g_b = load_row(g_ptr, 0, D, A, B)
    g_a, g_b = g_a / outer_count, g_b / outer_count
    q_a, q_b = load_row(q_ptr, 0, D, A, B)
    kc_a, kc_b = load_row(k_ptr, k_cls, D, A, B)
    vc_a, vc_b = load_row(v_ptr, v_cls, D, A, B)
    own_s = row_dot(q_a, q_b, kc_a, kc_b, B) * (scale * LOG2E)
    own_dp = row_dot(g_a, g_b, vc_a, vc_b, B)
    top, mixed = own_s, own_dp
    total = 1.0
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        token = token_rows(j, run, stride_run, stride_token, RUNS)
        k_a, k_b = load_head(k_ptr, k_at + token * stride_ks, j < length, D, A, B)
        v_a, v_b = load_head(v_ptr, v_at + token * stride_vs, j < length, D, A, B)
        s = tl.where(j < length, row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        keep = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top)
        top = new_top
        total = total * keep + tl.sum(p, 0)
        mixed = mixed * keep + tl.sum(p * row_scores(v_a, v_b, g_a, g_b, B), 0)
    lse = top + tl.log2(total)
    delta = mixed / total
    tl.store(stats_ptr, lse)
    tl.store(stats_ptr + 1, delta)
    own_p = tl.exp2(own_s - lse)
    own_ds = own_p * (own_dp - delta) * scale
    store_row(dk_part_ptr, 0, own_ds * q_a, own_ds * q_b, D, A, B)
    store_row(dv_part_ptr, 0, own_p * g_a, own_p * g_b, D, A, B)
    dq_a, dq_b = own_ds * kc_a, own_ds * kc_b
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        token = token_rows(j, run, stride_run, stride_token, RUNS)
        k_a, k_b = load_head(k_ptr, k_at + token * stride_ks, j < length, D, A, B)
        v_a, v_b = load_head(v_ptr, v_at + token * stride_vs, j < length, D, A, B)
        s = row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E)
        p = tl.where(j < length, tl.exp2(s - lse), 0.0)
        ds = p * (row_scores(v_a, v_b, g_a, g_b, B) - delta) * scale
        dq_a, dq_b = row_mix(ds, k_a, k_b, dq_a, dq_b, B)
    store_row(dq_part_ptr, 0, dq_a, dq_b, D, A, B)


@triton.jit
def cls_query_on_keys(
    g_ptr, q_ptr, stats_ptr, k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, scale, outer_count,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Add what a tile of keys and values receives from the CLS as a query; dk without its factor `scale`."""
    g_a, g_b = load_row(g_ptr, 0, D, A, B)
    g_a, g_b = g_a / outer_count, g_b / outer_count
    q_a, q_b = load_row(q_ptr, 0, D, A, B)
    p = tl.exp2(row_scores(k_a, k_b, q_a, q_b, B) * (scale * LOG2E) - tl.load(stats_ptr))
    ds = p * (row_scores(v_a, v_b, g_a, g_b, B) - tl.load(stats_ptr + 1))
    dk_a, dk_b = row_spread(ds, q_a, q_b, dk_a, dk_b, B)
    dv_a, dv_b = row_spread(p, g_a, g_b, dv_a, dv_b, B)
    return dk_a, dk_b, dv_a, dv_b


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
