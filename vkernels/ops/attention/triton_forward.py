"""The forward kernel: a tile of queries meets the keys its intervals span, blocks of them at a time."""

import triton
import triton.language as tl

from vkernels.triton.head import load_head, mix, scores, store_head, zero_head
from vkernels.triton.rows import PACKED, place, token_rows
from vkernels.triton.softmax import LOG2E, natural_lse, normalise, softmax_step
from vkernels.triton.visible import interval, key_steps, mask_of, span, visible


@triton.jit
def _attend(
    acc_a, acc_b, top, total, q_a, q_b, i, live, start, end, first, limit, group,
    k_ptr, v_ptr, stride_ks, stride_vs, k_side, box, lows, highs, scale, len_q, len_k,
    RELATIONS: tl.constexpr, FORM: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys from `first` on; without MASKED every key is there and every query sees it."""
    j = first + tl.arange(0, BLOCK_N)
    there = j < limit if MASKED else tl.full([BLOCK_N], 1, tl.int1)
    row = token_rows(j, there, k_side, group, 1, FORM)
    k_a, k_b = load_head(k_ptr, row * stride_ks, there, D, A, B)
    s = scores(q_a, q_b, k_a, k_b, B) * scale
    if MASKED:
        sees = visible(i, live, j, there, start, end, box, lows, highs, len_q, len_k, RELATIONS, FORM, False)
        s = tl.where(sees, s, float("-inf"))
    p, keep, top, total = softmax_step(s, top, total)
    v_a, v_b = load_head(v_ptr, row * stride_vs, there, D, A, B)
    acc_a = acc_a * keep[:, None]
    if B > 0:
        acc_b = acc_b * keep[:, None]
    acc_a, acc_b = mix(p, v_a, v_b, acc_a, acc_b, B)
    return acc_a, acc_b, top, total


# What grows with the number of tokens must not be specialised on, or every length would compile anew.
LENGTHS = [
    "stride_qb", "stride_qs", "stride_qn", "stride_kb", "stride_ks", "stride_kn", "stride_vb", "stride_vs", "stride_vn",
    "per_sample", "n", "share", "s_q", "s_k", "len_q", "len_k", "all_q", "all_k", "groups", "tiles", "step",
    "q_group", "q_token", "k_group", "k_token", "lo0", "hi0", "lo1", "hi1", "lo2", "hi2", "lo3", "hi3",
]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    q_rows_ptr, k_rows_ptr, q_count_ptr, k_count_ptr, ranges_ptr, q_attr_ptr, k_attr_ptr, q_global_ptr, k_global_ptr,
    per_sample, n, share, s_q, s_k, len_q, len_k, all_q, all_k, groups, q_group, q_token, k_group, k_token,
    lo0, hi0, lo1, hi1, lo2, hi2, lo3, hi3, scale, tiles, step,
    R: tl.constexpr, RELATIONS: tl.constexpr, FORM: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, group, head, sample = place(tiles, groups, n)
    tile = tiles - 1 - tile  # causal masks leave most keys to the last queries: those first
    q_ptr += sample * stride_qb * ALIGN + head.to(tl.int64) * stride_qn * ALIGN
    k_ptr += sample * stride_kb * ALIGN + (head // share).to(tl.int64) * stride_kn * ALIGN
    v_ptr += sample * stride_vb * ALIGN + (head // share).to(tl.int64) * stride_vn * ALIGN
    q_side, k_side, live_q, live_k, ranges_ptr, box = mask_of(
        sample, per_sample,
        (q_rows_ptr, k_rows_ptr, q_count_ptr, k_count_ptr, ranges_ptr, q_attr_ptr, k_attr_ptr, q_global_ptr,
         k_global_ptr),
        (s_q, len_q, all_q, q_group, q_token), (s_k, len_k, all_k, k_group, k_token),
        R, RELATIONS, FORM,
    )  # fmt: skip
    lows, highs = (lo0, lo1, lo2, lo3), (hi0, hi1, hi2, hi3)
    ALL_MASKED: tl.constexpr = RELATIONS > 0 or FORM >= PACKED

    i = tl.arange(0, BLOCK_M)
    exists = (i < step) & (tile * step + i < all_q)
    i = tile * step + i
    live = exists & (i < live_q)
    row = token_rows(i, exists, q_side, group, 0, FORM)
    q_a, q_b = load_head(q_ptr, row * stride_qs * ALIGN, live, D, A, B)
    acc_a, acc_b = zero_head(BLOCK_M, A, B)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    INTERVALS: tl.constexpr = R if R > 0 else 1
    for r in range(INTERVALS):
        start, end = interval(ranges_ptr, i, live, r, live_k, len_q, len_k, R, FORM)
        first, last, core_first, core_last = span(start, end, live)
        steps, before, core = key_steps(first, last, core_first, core_last, BLOCK_N)
        if ALL_MASKED:
            core = 0
        for t in range(0, steps - core):
            block = first + tl.where(t < before, t, t + core) * BLOCK_N
            acc_a, acc_b, top, total = _attend(
                acc_a, acc_b, top, total, q_a, q_b, i, live, start, end, block, last, group,
                k_ptr, v_ptr, stride_ks * ALIGN, stride_vs * ALIGN, k_side, box, lows, highs, scale * LOG2E,
                len_q, len_k, RELATIONS, FORM, D, A, B, True, BLOCK_N,
            )  # fmt: skip
        if not ALL_MASKED:
            for t in range(before, before + core):
                acc_a, acc_b, top, total = _attend(
                    acc_a, acc_b, top, total, q_a, q_b, i, live, start, end, first + t * BLOCK_N, last, group,
                    k_ptr, v_ptr, stride_ks * ALIGN, stride_vs * ALIGN, k_side, box, lows, highs, scale * LOG2E,
                    len_q, len_k, RELATIONS, FORM, D, A, B, False, BLOCK_N,
                )  # fmt: skip

    total = tl.where(live, total, 0.0)  # the core asks nobody: dropped queries went through it, too
    acc_a = tl.where(live[:, None], normalise(acc_a, total), 0.0)
    if B > 0:
        acc_b = tl.where(live[:, None], normalise(acc_b, total), 0.0)
    store_head(out_ptr, ((sample * s_q + row) * n + head) * D, exists, acc_a, acc_b, D, A, B)
    tl.store(lse_ptr + (sample * n + head) * s_q + row, natural_lse(top, total), mask=exists)
