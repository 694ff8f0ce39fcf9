"""Who sees whom: key intervals of queries, what a tile of queries makes of them, and the finer box on top.

Of the keys a tile of queries meets, those that every query of the tile sees are its core: no mask code runs there.
"""

import triton
import triton.language as tl

from vkernels.triton.rows import PACKED, live_tokens

FAR: tl.constexpr = tl.constexpr(2**30)  # no index lies beyond


@triton.jit
def _of_sample(ptr, sample, size, per_sample, BIT: tl.constexpr):
    """A mask tensor at its sample, `size` elements each; bit BIT of `per_sample` is 0 where samples share it."""
    return ptr + sample * size * ((per_sample >> BIT) & 1)


@triton.jit
def mask_of(
    sample, per_sample, tensors, q_sizes, k_sizes, R: tl.constexpr, RELATIONS: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """(q side, k side, live queries, live keys, ranges, box) of one sample; sides as in rows.py, box as in `visible`.

    tensors: those of a MaskPlan, anything where FORM says that there is none; sizes: (tokens, length of a group,
    indices, group stride, token stride)."""
    q_rows_ptr, k_rows_ptr, q_count_ptr, k_count_ptr, ranges_ptr, q_attr_ptr, k_attr_ptr, q_global_ptr, k_global_ptr = (
        tensors
    )
    s_q, len_q, all_q, q_group, q_token = q_sizes
    s_k, len_k, all_k, k_group, k_token = k_sizes
    long_q, long_k = len_q.to(tl.int64), len_k.to(tl.int64)
    q_side = (_of_sample(q_rows_ptr, sample, s_q, per_sample, 0), s_q, len_q, q_group, q_token)
    k_side = (_of_sample(k_rows_ptr, sample, s_k, per_sample, 1), s_k, len_k, k_group, k_token)
    live_q = live_tokens(_of_sample(q_count_ptr, sample, 1, per_sample, 2), all_q, 0, FORM)
    live_k = live_tokens(_of_sample(k_count_ptr, sample, 1, per_sample, 3), all_k, 1, FORM)
    ranges_ptr = _of_sample(ranges_ptr, sample, 2 * R * long_q, per_sample, 4)
    box = (
        _of_sample(q_attr_ptr, sample, RELATIONS * long_q, per_sample, 5),
        _of_sample(k_attr_ptr, sample, RELATIONS * long_k, per_sample, 6),
        _of_sample(q_global_ptr, sample, long_q, per_sample, 7),
        _of_sample(k_global_ptr, sample, long_k, per_sample, 8),
    )
    return q_side, k_side, live_q, live_k, ranges_ptr, box


@triton.jit
def interval(ranges_ptr, i, live, r, live_k, len_q, len_k, R: tl.constexpr, FORM: tl.constexpr):
    """Half-open key interval `r` of queries `i`, inside the live keys whatever `ranges` holds; (x, x) of dead ones.

    R = 0: every live key of the group.
    """
    inner, base, start = i, tl.zeros_like(i), tl.zeros_like(i)
    end = start + live_k
    if FORM >= PACKED:
        inner, base, end = i % len_q, (i // len_q) * len_k, start + len_k
    if R > 0:
        at = inner.to(tl.int64) * (2 * R) + 2 * r
        start = tl.maximum(tl.load(ranges_ptr + at, mask=live, other=0), 0)
        end = tl.minimum(tl.load(ranges_ptr + at + 1, mask=live, other=0), end)
    end = tl.where(live & (start < end), end, start)
    return base + start, base + end


@triton.jit
def span(start, end, live):
    """(first, last, core_first, core_last) of a tile of queries: keys outside [first, last) meet none of its live
    queries, keys in [core_first, core_last) are seen by all of them."""
    sees = start < end
    first = tl.min(tl.where(sees, start, FAR), 0)
    last = tl.max(tl.where(sees, end, 0), 0)
    core_first = tl.max(tl.where(sees, start, 0), 0)
    core_last = tl.min(
        tl.where(live, tl.where(sees, end, 0), FAR), 0
    )  # a live query that sees nothing empties the core
    return first, last, core_first, core_last


@triton.jit
def key_steps(first, last, core_first, core_last, BLOCK: tl.constexpr):
    """(steps, before, core): [first, last) takes `steps` blocks of keys; `before` of them, then `core` that need no
    mask code, then the rest."""
    steps = (tl.maximum(last - first, 0) + BLOCK - 1) // BLOCK
    before = tl.minimum((tl.maximum(core_first - first, 0) + BLOCK - 1) // BLOCK, steps)
    core = tl.maximum(tl.minimum(core_last, last) - first, 0) // BLOCK - before
    return steps, before, tl.maximum(core, 0)


@triton.jit
def across(x, QUERIES: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """A vector over queries, or over keys, as an axis of a tile [queries, keys], or [keys, queries]."""
    if QUERIES == KEYS_FIRST:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def visible(
    i, seen, j, there, start, end, box, lows, highs, len_q, len_k,
    RELATIONS: tl.constexpr, FORM: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Which of keys `j` queries `i` see: inside [start, end), and inside the box where there is one.

    box = (q_attr, k_attr, q_global, k_global), its bounds in `lows` and `highs`; `seen` and `there` mark indices that
    may be read.
    """
    key = across(j, False, KEYS_FIRST)
    sees = (key >= across(start, True, KEYS_FIRST)) & (key < across(end, True, KEYS_FIRST))
    if RELATIONS > 0:
        q_attr_ptr, k_attr_ptr, q_global_ptr, k_global_ptr = box
        if FORM >= PACKED:
            i, j = i % len_q, j % len_k
        inside = sees
        for a in tl.static_range(RELATIONS):
            q_attr = tl.load(q_attr_ptr + a * len_q.to(tl.int64) + i, mask=seen, other=0)
            k_attr = tl.load(k_attr_ptr + a * len_k.to(tl.int64) + j, mask=there, other=0)
            gap = across(k_attr, False, KEYS_FIRST) - across(q_attr, True, KEYS_FIRST)
            inside = inside & (gap >= lows[a]) & (gap <= highs[a])
        if (FORM >> 7) & 1:
            everywhere = tl.load(q_global_ptr + i, mask=seen, other=0) != 0
            inside = inside | (sees & across(everywhere, True, KEYS_FIRST))
        if (FORM >> 8) & 1:
            everywhere = tl.load(k_global_ptr + j, mask=there, other=0) != 0
            inside = inside | (sees & across(everywhere, False, KEYS_FIRST))
        sees = inside
    return sees


@triton.jit
def _meets(bounds_ptr, t, tiles, k_first, k_last, FULL: tl.constexpr, BOX: tl.constexpr):
    """Which query tiles `t` meet keys [k_first, k_last): with a core that covers them all (FULL), or without."""
    there = t < tiles
    first = tl.load(bounds_ptr + t, mask=there, other=0)
    last = tl.load(bounds_ptr + tiles + t, mask=there, other=0)
    meets = (first < k_last) & (last > k_first) & (first < last)
    if BOX:
        return meets
    else:
        core_first = tl.load(bounds_ptr + 2 * tiles + t, mask=there, other=0)
        core_last = tl.load(bounds_ptr + 3 * tiles + t, mask=there, other=0)
        covers = (core_first <= k_first) & (core_last >= k_last)
        return meets & (covers if FULL else ~covers)


@triton.jit
def next_run(
    bounds_ptr, at, tiles, k_first, k_last, FULL: tl.constexpr, BOX: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """[begin, end): the next run of query tiles, from tile `at` on, that meet keys [k_first, k_last) in the way FULL
    says; begin = tiles where there is none. bounds [4, tiles]: what `span` says of each tile."""
    begin, chunk = tiles, at
    while (begin >= tiles) & (chunk < tiles):
        t = chunk + tl.arange(0, SCAN)
        begin = tl.min(tl.where(_meets(bounds_ptr, t, tiles, k_first, k_last, FULL, BOX), t, tiles), 0)
        chunk += SCAN
    end, chunk = tiles, begin
    while (end >= tiles) & (chunk < tiles):
        t = chunk + tl.arange(0, SCAN)
        end = tl.min(tl.where(_meets(bounds_ptr, t, tiles, k_first, k_last, FULL, BOX), tiles, t), 0)
        end = tl.minimum(end, tiles)
        chunk += SCAN
    return begin, end
