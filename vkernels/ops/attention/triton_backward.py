"""The backward kernels. No atomics: a tile of queries sums its own gradient, then a tile of keys sums its own.

dq      walks the keys of a tile of queries as the forward does, and leaves delta = rowsum(dout * out) - dlse behind.
bounds  notes down what each tile of queries sees, for
dk, dv  which walks the queries that see a tile of keys, all query heads of its group one after the other.
"""

import triton
import triton.language as tl

from vkernels.ops.attention.triton_forward import LENGTHS
from vkernels.triton.head import load_head, mix, scores, store_head, zero_head
from vkernels.triton.rows import PACKED, live_tokens, place, token_rows
from vkernels.triton.softmax import LOG2E
from vkernels.triton.visible import interval, key_steps, mask_of, next_run, span, visible

MORE_LENGTHS = [*LENGTHS, "stride_gb", "stride_gs", "stride_gn"]


@triton.jit
def _weights(s, lse, sees, MASKED: tl.constexpr):
    """Probabilities of scores in base 2; `lse` is along the axis of the queries, +inf where a query sees nothing."""
    p = tl.exp2(s - lse)
    return tl.where(sees, p, 0.0) if MASKED else p


@triton.jit
def _load_lse(lse_ptr, at, live):
    """lse in base 2; +inf for what is not live or saw nothing, so that every weight of the row is 0."""
    lse = tl.load(lse_ptr + at, mask=live, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _dq_step(
    acc_a, acc_b, q_a, q_b, g_a, g_b, lse, delta, i, live, start, end, first, limit, group,
    k_ptr, v_ptr, stride_ks, stride_vs, k_side, box, lows, highs, scale, len_q, len_k,
    RELATIONS: tl.constexpr, FORM: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of keys from `first` on; without MASKED every key is there and every query sees it."""
    j = first + tl.arange(0, BLOCK_N)
    there = j < limit if MASKED else tl.full([BLOCK_N], 1, tl.int1)
    row = token_rows(j, there, k_side, group, 1, FORM)
    k_a, k_b = load_head(k_ptr, row * stride_ks, there, D, A, B)
    v_a, v_b = load_head(v_ptr, row * stride_vs, there, D, A, B)
    s = scores(q_a, q_b, k_a, k_b, B) * scale
    sees = there[None, :]
    if MASKED:
        sees = visible(i, live, j, there, start, end, box, lows, highs, len_q, len_k, RELATIONS, FORM, False)
    p = _weights(s, lse[:, None], sees, MASKED)
    dp = scores(g_a, g_b, v_a, v_b, B)
    return mix(p * (dp - delta[:, None]), k_a, k_b, acc_a, acc_b, B)


@triton.jit(do_not_specialize=MORE_LENGTHS)
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_gb, stride_gs, stride_gn,
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
    g_ptr += sample * stride_gb * ALIGN + head.to(tl.int64) * stride_gn * ALIGN
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
    at = ((sample * s_q + row) * n + head) * D
    q_a, q_b = load_head(q_ptr, row * stride_qs * ALIGN, live, D, A, B)
    g_a, g_b = load_head(g_ptr, row * stride_gs * ALIGN, live, D, A, B)
    o_a, o_b = load_head(out_ptr, at, live, D, A, B)
    delta = tl.sum(g_a.to(tl.float32) * o_a.to(tl.float32), 1)
    if B > 0:
        delta += tl.sum(g_b.to(tl.float32) * o_b.to(tl.float32), 1)
    of_row = (sample * n + head) * s_q + row
    lse = _load_lse(lse_ptr, of_row, live)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + of_row, mask=live, other=0.0)
    delta = tl.where(lse == float("inf"), 0.0, delta)
    tl.store(delta_ptr + of_row, delta, mask=exists)
    acc_a, acc_b = zero_head(BLOCK_M, A, B)

    INTERVALS: tl.constexpr = R if R > 0 else 1
    for r in range(INTERVALS):
        start, end = interval(ranges_ptr, i, live, r, live_k, len_q, len_k, R, FORM)
        first, last, core_first, core_last = span(start, end, live)
        steps, before, core = key_steps(first, last, core_first, core_last, BLOCK_N)
        if ALL_MASKED:
            core = 0
        for t in range(0, steps - core):
            block = first + tl.where(t < before, t, t + core) * BLOCK_N
            acc_a, acc_b = _dq_step(
                acc_a, acc_b, q_a, q_b, g_a, g_b, lse, delta, i, live, start, end, block, last, group,
                k_ptr, v_ptr, stride_ks * ALIGN, stride_vs * ALIGN, k_side, box, lows, highs, scale * LOG2E,
                len_q, len_k, RELATIONS, FORM, D, A, B, True, BLOCK_N,
            )  # fmt: skip
        if not ALL_MASKED:
            for t in range(before, before + core):
                acc_a, acc_b = _dq_step(
                    acc_a, acc_b, q_a, q_b, g_a, g_b, lse, delta, i, live, start, end, first + t * BLOCK_N, last, group,
                    k_ptr, v_ptr, stride_ks * ALIGN, stride_vs * ALIGN, k_side, box, lows, highs, scale * LOG2E,
                    len_q, len_k, RELATIONS, FORM, D, A, B, False, BLOCK_N,
                )  # fmt: skip
    store_head(dq_ptr, at, exists, acc_a * scale, acc_b * scale, D, A, B)


@triton.jit(do_not_specialize=["per_sample", "len_q", "len_k", "tiles"])
def _attention_bounds_kernel(
    ranges_ptr, q_count_ptr, k_count_ptr, bounds_ptr, per_sample, len_q, len_k, tiles,
    R: tl.constexpr, FORM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """bounds [sample, interval, 4, tile]: what `span` says of interval r of a tile of queries."""
    tile, r, sample = tl.program_id(0) % tiles, tl.program_id(0) // tiles % R, tl.program_id(0) // tiles // R
    live_q = live_tokens(q_count_ptr + sample * ((per_sample >> 2) & 1), len_q, 0, FORM)
    live_k = live_tokens(k_count_ptr + sample * ((per_sample >> 3) & 1), len_k, 1, FORM)
    ranges_ptr += sample.to(tl.int64) * ((per_sample >> 4) & 1) * len_q * (2 * R)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = i < live_q
    start, end = interval(ranges_ptr, i, live, r, live_k, len_q, len_k, R, FORM)
    first, last, core_first, core_last = span(start, end, live)
    bounds_ptr += (sample * R + r).to(tl.int64) * 4 * tiles + tile
    tl.store(bounds_ptr, first)
    tl.store(bounds_ptr + tiles, last)
    tl.store(bounds_ptr + 2 * tiles, core_first)
    tl.store(bounds_ptr + 3 * tiles, core_last)


@triton.jit
def _dkv_step(
    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, j, there, first, limit, r, group,
    q_ptr, g_ptr, lse_ptr, delta_ptr, stride_qs, stride_gs, q_side, ranges_ptr, box, lows, highs, scale,
    live_k, len_q, len_k,
    R: tl.constexpr, RELATIONS: tl.constexpr, FORM: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dk, dv of queries [first, first + BLOCK_M) below `limit`; without MASKED all of them see every key that is there.

    Scores stand as [keys, queries], so that weights meet dout and q without being turned.
    """
    i = first + tl.arange(0, BLOCK_M)
    live = i < limit
    row = token_rows(i, live, q_side, group, 0, FORM)
    q_a, q_b = load_head(q_ptr, row * stride_qs, live, D, A, B)
    g_a, g_b = load_head(g_ptr, row * stride_gs, live, D, A, B)
    lse = _load_lse(lse_ptr, row, live)
    delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    s = scores(k_a, k_b, q_a, q_b, B) * scale
    sees = live[None, :]
    if MASKED:
        start, end = interval(ranges_ptr, i, live, r, live_k, len_q, len_k, R, FORM)
        sees = visible(i, live, j, there, start, end, box, lows, highs, len_q, len_k, RELATIONS, FORM, True)
    p = _weights(s, lse[None, :], sees, MASKED)
    dv_a, dv_b = mix(p, g_a, g_b, dv_a, dv_b, B)
    dp = scores(v_a, v_b, g_a, g_b, B)
    dk_a, dk_b = mix(p * (dp - delta[None, :]), q_a, q_b, dk_a, dk_b, B)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit
def _dkv_run(
    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, j, there, first, count, limit, r, group, share,
    q_ptr, g_ptr, lse_ptr, delta_ptr, stride_qs, stride_qn, stride_gs, stride_gn, s_q, q_side, ranges_ptr,
    box, lows, highs, scale, live_k, len_q, len_k,
    R: tl.constexpr, RELATIONS: tl.constexpr, FORM: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`count` tiles of queries from `first` on, for every query head of the group: one loop, its loads run ahead."""
    for x in range(0, share * count):
        head = (x // count).to(tl.int64)
        dk_a, dk_b, dv_a, dv_b = _dkv_step(
            dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, j, there, first + x % count * BLOCK_M, limit, r, group,
            q_ptr + head * stride_qn, g_ptr + head * stride_gn, lse_ptr + head * s_q, delta_ptr + head * s_q,
            stride_qs, stride_gs, q_side, ranges_ptr, box, lows, highs, scale, live_k, len_q, len_k,
            R, RELATIONS, FORM, D, A, B, MASKED, BLOCK_M,
        )  # fmt: skip
    return dk_a, dk_b, dv_a, dv_b


@triton.jit(do_not_specialize=[*MORE_LENGTHS, "m", "q_tiles"])
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, bounds_ptr, dk_ptr, dv_ptr, m, q_tiles,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    stride_gb, stride_gs, stride_gn,
    q_rows_ptr, k_rows_ptr, q_count_ptr, k_count_ptr, ranges_ptr, q_attr_ptr, k_attr_ptr, q_global_ptr, k_global_ptr,
    per_sample, n, share, s_q, s_k, len_q, len_k, all_q, all_k, groups, q_group, q_token, k_group, k_token,
    lo0, hi0, lo1, hi1, lo2, hi2, lo3, hi3, scale, tiles, step,
    R: tl.constexpr, RELATIONS: tl.constexpr, FORM: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    tile, group, head, sample = place(tiles, groups, m)
    first_head = (head * share).to(tl.int64)
    q_ptr += sample * stride_qb * ALIGN + first_head * stride_qn * ALIGN
    g_ptr += sample * stride_gb * ALIGN + first_head * stride_gn * ALIGN
    k_ptr += sample * stride_kb * ALIGN + head.to(tl.int64) * stride_kn * ALIGN
    v_ptr += sample * stride_vb * ALIGN + head.to(tl.int64) * stride_vn * ALIGN
    lse_ptr += (sample * n + first_head) * s_q
    delta_ptr += (sample * n + first_head) * s_q
    q_side, k_side, live_q, live_k, ranges_ptr, box = mask_of(
        sample, per_sample,
        (q_rows_ptr, k_rows_ptr, q_count_ptr, k_count_ptr, ranges_ptr, q_attr_ptr, k_attr_ptr, q_global_ptr,
         k_global_ptr),
        (s_q, len_q, all_q, q_group, q_token), (s_k, len_k, all_k, k_group, k_token),
        R, RELATIONS, FORM,
    )  # fmt: skip
    lows, highs = (lo0, lo1, lo2, lo3), (hi0, hi1, hi2, hi3)
    BOX: tl.constexpr = RELATIONS > 0

    k_first = tile * step
    k_last = tl.minimum(k_first + step, live_k)
    j = k_first + tl.arange(0, BLOCK_N)
    exists = (tl.arange(0, BLOCK_N) < step) & (j < all_k)
    there = j < k_last
    row = token_rows(j, exists, k_side, group, 1, FORM)
    k_a, k_b = load_head(k_ptr, row * stride_ks * ALIGN, there, D, A, B)
    v_a, v_b = load_head(v_ptr, row * stride_vs * ALIGN, there, D, A, B)
    dk_a, dk_b = zero_head(BLOCK_N, A, B)
    dv_a, dv_b = zero_head(BLOCK_N, A, B)

    if R == 0 or FORM >= PACKED:
        first, limit = 0, live_q
        if FORM >= PACKED:  # the queries of the groups whose keys these are
            first = k_first // len_k * len_q
            limit = (tl.minimum(k_first + step, all_k) - 1) // len_k * len_q + len_q
        dk_a, dk_b, dv_a, dv_b = _dkv_run(
            dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, j, there, first, (limit - first + BLOCK_M - 1) // BLOCK_M,
            limit, 0, group, share, q_ptr, g_ptr, lse_ptr, delta_ptr,
            stride_qs * ALIGN, stride_qn * ALIGN, stride_gs * ALIGN, stride_gn * ALIGN, s_q, q_side, ranges_ptr,
            box, lows, highs, scale * LOG2E, live_k, len_q, len_k,
            R, RELATIONS, FORM, D, A, B, BOX or FORM >= PACKED, BLOCK_M,
        )  # fmt: skip
    else:
        bounds_ptr += sample * ((per_sample >> 9) & 1) * R * 4 * q_tiles
        for r in range(R):
            for full in tl.static_range(1 if BOX else 2):
                at, end = next_run(bounds_ptr, 0, q_tiles, k_first, k_last, full, BOX, SCAN)
                while at < q_tiles:
                    dk_a, dk_b, dv_a, dv_b = _dkv_run(
                        dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, j, there, at * BLOCK_M, end - at,
                        live_q, r, group, share, q_ptr, g_ptr, lse_ptr, delta_ptr,
                        stride_qs * ALIGN, stride_qn * ALIGN, stride_gs * ALIGN, stride_gn * ALIGN, s_q, q_side,
                        ranges_ptr, box, lows, highs, scale * LOG2E, live_k, len_q, len_k,
                        R, RELATIONS, FORM, D, A, B, not full, BLOCK_M,
                    )  # fmt: skip
                    at, end = next_run(bounds_ptr, end, q_tiles, k_first, k_last, full, BOX, SCAN)
            bounds_ptr += 4 * q_tiles

    seen = there[:, None]  # dropped keys went through the unmasked products, too
    at = ((sample * s_k + row) * m + head) * D
    store_head(dk_ptr, at, exists, tl.where(seen, dk_a * scale, 0.0), tl.where(seen, dk_b * scale, 0.0), D, A, B)
    store_head(dv_ptr, at, exists, tl.where(seen, dv_a, 0.0), tl.where(seen, dv_b, 0.0), D, A, B)
