"""decode_attention on Triton: the heads that share keys are the rows of one tile, the keys are split over programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import bind, require, same_dtype
from vkernels.counters import counters
from vkernels.kv_cache import Layout
from vkernels.library import unit_stride
from vkernels.remember import planned
from vkernels.triton.codes import add_codes, load_words, planes, unit_rows
from vkernels.triton.head import load_head
from vkernels.triton.history import checked_cache, history_range, page_of, recent_range, ring_slot, seen_range, share_of
from vkernels.triton.launch import alignment, arch, cdiv, launch, power_of_2
from vkernels.triton.matmul import dot
from vkernels.triton.parts import is_last, join, leave_part
from vkernels.triton.softmax import LOG2E, softmax_step
from vkernels.triton.tiles import tiles

NAME = "decode_attention"
# What grows with lengths: specialised on, every capacity would compile anew.
LENGTHS = ["stride_qb", "pages", "table_pages", "page", "ring", "sinks", "residual", "room", "splits", "window"]


@triton.jit
def _query_rows(m, share, s, R: tl.constexpr):
    """Which queries this program has: (sample, key/value head, row among those that share it, is it one)."""
    blocks = (share * s + R - 1) // R
    program = tl.program_id(0)
    row = program % blocks * R + tl.arange(0, R)
    head = program // blocks
    return (head // m).to(tl.int64), (head % m).to(tl.int64), row, row < share * s


@triton.jit
def _load_queries(
    q_ptr, stride_qb, stride_qs, stride_qn, sample, head, share, s, row, live,
    D: tl.constexpr, A: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = sample * stride_qb + (row % s).to(tl.int64) * stride_qs + (head * share + row // s) * stride_qn
    q, _ = load_head(q_ptr, at * ALIGN, live, D, A, 0)
    return q.to(tl.float32) if WIDE else q


@triton.jit
def _finish(
    o_ptr, lse_ptr, part_ptr, counter_ptr, sample, head, m, share, s, row, live, used, splits,
    D: tl.constexpr, A: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    if is_last(counter_ptr, splits):
        n, heads = m * share, head * share + row // s
        o_at, lse_at = ((sample * s + row % s) * n + heads) * D, (sample * n + heads) * s + row % s
        join(o_ptr, lse_ptr, part_ptr, o_at, lse_at, live, used, splits, D, A, R)


@triton.jit
def _attend_tile(
    q, k_ptr, v_ptr, at, live, pos, last, hidden, scale, top, total, acc, D: tl.constexpr, A: tl.constexpr
):
    """One tile of tokens kept as they are, which start at elements `at`."""
    k, _ = load_head(k_ptr, at, live, D, A, 0)
    visible = live[None, :] & (pos[None, :] <= last[:, None]) & (pos[None, :] > hidden[:, None])
    s = tl.where(visible, dot(q, tl.trans(k.to(q.dtype))) * scale, float("-inf"))
    p, keep, top, total = softmax_step(s, top, total)
    v, _ = load_head(v_ptr, at, live, D, A, 0)
    return top, total, acc * keep[:, None] + dot(p.to(q.dtype), v.to(q.dtype))


@triton.jit(do_not_specialize=LENGTHS)
def _decode_rows_kernel(
    q_ptr, o_ptr, lse_ptr, part_ptr, counter_ptr, length_ptr, table_ptr, k_ptr, v_ptr, k_sink_ptr, v_sink_ptr,
    stride_qb, stride_qs, stride_qn, m, share, s, pages, table_pages, page, ring, sinks, residual, room, splits,
    scale, window,
    D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr,
    PAGED: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample, head, row, live_row = _query_rows(m, share, s, R)
    split = tl.program_id(1)
    q = _load_queries(q_ptr, stride_qb, stride_qs, stride_qn, sample, head, share, s, row, live_row, D, A, ALIGN, WIDE)
    length = tl.maximum(tl.load(length_ptr + sample), 0)
    window = tl.minimum(window, length)  # a longer one hides no more, and 32 bits hold every difference
    last, hidden = seen_range(length, row, s, window)
    begin, end = history_range(length, s, window, sinks, residual, room, ring, G, RING)
    first, beyond, used = share_of((end - begin + BLOCK_N - 1) // BLOCK_N, split, splits)
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, A], tl.float32)
    lane = tl.arange(0, BLOCK_N)
    if SINKS:
        used = tl.maximum(used, 1)
        for start in range(0, tl.where(split == 0, tl.minimum(length, sinks), 0), BLOCK_N):
            pos = start + lane
            at = ((sample * m + head) * sinks + pos) * D
            live = pos < tl.minimum(length, sinks)
            top, total, acc = _attend_tile(
                q, k_sink_ptr, v_sink_ptr, at, live, pos, last, hidden, scale, top, total, acc, D, A
            )
    for tile in range(first, beyond):
        offset = tile * BLOCK_N + lane
        live = offset < end - begin
        slot = ring_slot(begin % ring, offset, ring) if RING else begin + offset
        entry, in_page = page_of(table_ptr, sample, tl.where(live, slot, 0), live, page, table_pages, pages, PAGED)
        at = ((entry * m + head) * page + in_page) * D
        pos = begin + sinks + offset
        top, total, acc = _attend_tile(q, k_ptr, v_ptr, at, live, pos, last, hidden, scale, top, total, acc, D, A)
    leave_part(part_ptr, split, splits, live_row, top, total, acc, 0, D, A, R)
    _finish(o_ptr, lse_ptr, part_ptr, counter_ptr, sample, head, m, share, s, row, live_row, used, splits, D, A, R)


@triton.jit
def _attend_codes(
    q, unit_q, norm, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr, place, pos, last, hidden, scale,
    top, total, acc,
    D: tl.constexpr, A: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One group of coded tokens, that at `place` of the storage; acc is a tuple, one tile per group of channels.

    Keys:   q k = norm (unit_q delta) (code - middle) + q (zero + middle delta)
    Values: p v = (p delta) (code - middle) + p (zero + middle delta)
    """
    PER: tl.constexpr = 32 // BITS
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    K_ROWS: tl.constexpr = A // PER if A >= 16 * PER else 16
    V_ROWS: tl.constexpr = G // PER if G >= 16 * PER else 16
    K_WORDS: tl.constexpr = (D + PER - 1) // PER
    GROUPS: tl.constexpr = (D + G - 1) // G
    LANES: tl.constexpr = G if G < A else A
    PADDED: tl.constexpr = (D + 15) // 16 * 16
    K_L: tl.constexpr = A // K_ROWS
    V_L: tl.constexpr = G // V_ROWS
    channel, token = tl.arange(0, A), tl.arange(0, G)

    delta = tl.load(k_scale_ptr + place * (2 * D) + channel, mask=channel < D, other=0.0).to(tl.float32)
    zero = tl.load(k_scale_ptr + place * (2 * D) + D + channel, mask=channel < D, other=0.0).to(tl.float32)
    bias = tl.sum(q.to(tl.float32) * (zero + MIDDLE * delta)[None, :], 1)
    factors = planes(unit_q * delta.to(unit_q.dtype)[None, :], K_L)
    words = load_words(k_codes_ptr + place * (K_WORDS * G), G, G, K_WORDS, K_ROWS, K_ROWS * PER // A, G)
    s = add_codes(tl.zeros([q.shape[0], G], tl.float32), factors, words, BITS, K_ROWS, K_ROWS * PER // A, K_L)
    s = (s * norm[:, None] + bias[:, None]) * scale
    visible = (pos[None, :] <= last[:, None]) & (pos[None, :] > hidden[:, None])
    p, keep, top, total = softmax_step(tl.where(visible, s, float("-inf")), top, total)

    new = ()
    for i in tl.static_range(GROUPS):
        scale_at = v_scale_ptr + place * (2 * GROUPS * G) + i * G + token
        step = tl.load(scale_at).to(tl.float32)
        zero = tl.load(scale_at + GROUPS * G).to(tl.float32)
        unseen = p == 0.0  # whatever its value holds
        weight = tl.where(unseen, 0.0, p * step[None, :])
        bias = tl.sum(tl.where(unseen, 0.0, p * (zero + MIDDLE * step)[None, :]), 1)
        values = v_codes_ptr + place * (G // PER * PADDED) + i * G
        words = load_words(values, PADDED, D - i * G, G // PER, V_ROWS, V_ROWS * PER // G, LANES)
        part = acc[i] * keep[:, None] + bias[:, None]
        part = add_codes(part, planes(weight.to(unit_q.dtype), V_L), words, BITS, V_ROWS, V_ROWS * PER // G, V_L)
        new = new + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return top, total, new


@triton.jit(do_not_specialize=LENGTHS)
def _decode_codes_kernel(
    q_ptr, o_ptr, lse_ptr, part_ptr, counter_ptr, length_ptr, table_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr,
    v_scale_ptr, k_recent_ptr, v_recent_ptr, k_sink_ptr, v_sink_ptr,
    stride_qb, stride_qs, stride_qn, m, share, s, pages, table_pages, page, ring, sinks, residual, room, splits,
    scale, window,
    D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    PAGED: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample, head, row, live_row = _query_rows(m, share, s, R)
    split = tl.program_id(1)
    q = _load_queries(q_ptr, stride_qb, stride_qs, stride_qn, sample, head, share, s, row, live_row, D, A, ALIGN, WIDE)
    length = tl.maximum(tl.load(length_ptr + sample), 0)
    window = tl.minimum(window, length)  # a longer one hides no more, and 32 bits hold every difference
    last, hidden = seen_range(length, row, s, window)
    begin, end = history_range(length, s, window, sinks, residual, room, ring, G, RING)
    # Split 0 has what is kept uncoded, the others share the groups.
    first, beyond, used = share_of((end - begin) // G, split - 1, splits - 1)
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    if split == 0:
        acc = tl.zeros([R, A], tl.float32)
        lane = tl.arange(0, BLOCK_N)
        if SINKS:
            for start in range(0, tl.minimum(length, sinks), BLOCK_N):
                pos = start + lane
                at = ((sample * m + head) * sinks + pos) * D
                live = pos < tl.minimum(length, sinks)
                top, total, acc = _attend_tile(
                    q, k_sink_ptr, v_sink_ptr, at, live, pos, last, hidden, scale, top, total, acc, D, A
                )
        start, count = recent_range(length, s, window, sinks, residual, G)
        kept = residual + G
        for offset in range(0, count, BLOCK_N):
            slot = ring_slot(start % kept, offset + lane, kept)
            at = ((sample * m + head) * kept + slot) * D
            live = offset + lane < count
            pos = start + sinks + offset + lane
            top, total, acc = _attend_tile(
                q, k_recent_ptr, v_recent_ptr, at, live, pos, last, hidden, scale, top, total, acc, D, A
            )
        leave_part(part_ptr, 0, splits, live_row, top, total, acc, 0, D, A, R)
    else:
        LANES: tl.constexpr = G if G < A else A
        unit_q, norm = unit_rows(q)
        parts = ()
        for _ in tl.static_range((D + G - 1) // G):
            parts = parts + (tl.zeros([R, LANES], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        for index in range(first, beyond):
            slot = ring_slot(begin % ring, index * G, ring) if RING else begin + index * G
            entry, in_page = page_of(table_ptr, sample, slot, True, page, table_pages, pages, PAGED)
            place = (entry * m + head) * (page // G) + in_page // G
            pos = begin + sinks + index * G + tl.arange(0, G)
            top, total, parts = _attend_codes(
                q, unit_q, norm, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr, place, pos, last, hidden, scale,
                top, total, parts, D, A, G, BITS,
            )  # fmt: skip
        for i in tl.static_range((D + G - 1) // G):
            leave_part(part_ptr, split, splits, live_row, top, total, parts[i], i * G, D, LANES, R)
    _finish(o_ptr, lse_ptr, part_ptr, counter_ptr, sample, head, m, share, s, row, live_row, used + 1, splits, D, A, R)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(device: torch.device, steps: int, programs: int, per_sm: int, split_steps: int) -> int:
    """How many programs share the keys of a row of queries: enough to fill the chip, each with work worth a part.

    From sizes of storage only: what a sequence holds is known to the device alone, which divides that evenly.
    """
    chip = _multiprocessors(device) if device.type == "cuda" else 132
    return max(1, min(chip * per_sm // programs, cdiv(steps, split_steps)))


@planned
def decode_attention(q: Tensor, length: Tensor, table: Tensor, *rest: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    *storage, scale, window, layout = rest
    sizes = bind(NAME, ("q", q, "b s n d"), ("length", length, "b"))
    b, s, n, d = (sizes[axis] for axis in "bsnd")
    same_dtype(NAME, ("q", q))
    pool = storage[2] if layout and layout[0] else storage[0]
    m = pool.shape[1] if pool is not None and pool.dim() > 1 else 0
    require(m > 0 and n > 0 and n % m == 0, NAME, "q", "have a multiple of the cache's heads", n)
    require(1 <= s <= 8, NAME, "q", "hold 1 to 8 tokens", s)
    require(window >= 0, NAME, "window", "be at least 0", window)
    require(math.isfinite(scale), NAME, "scale", "be finite", scale)
    shape = checked_cache(NAME, length, table, storage, layout, m, d)
    attend = _plan(unit_stride(q), table, storage, shape) if b else None
    lse_shape, window = (b, n, s), min(window, 2**31 - 1)

    def run(q, length, table, *rest) -> tuple[Tensor, Tensor]:
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(lse_shape, dtype=torch.float32)
        if attend is not None:
            attend(unit_stride(q), o, lse, length, table, rest, rest[-3] * LOG2E.value, window)
        return o, lse

    return run


ROWS, CODES = (0, 1, 8, 9), (2, 3, 4, 5, 6, 7, 8, 9)  # of STORAGE, what either kernel takes


def _plan(q: Tensor, table: Tensor, storage: Sequence[Tensor], shape: Layout) -> Callable[..., None]:
    b, s, n, d = q.shape
    kept, pool = (storage[6], storage[2]) if shape.bits else (storage[0], storage[0])
    m, wide = pool.shape[1], q.dtype != kept.dtype or q.dtype == torch.float32
    kernel, taken = (_decode_codes_kernel, CODES) if shape.bits else (_decode_rows_kernel, ROWS)
    here = dict(tiles(NAME, kernel.fn.__name__, arch(q.device), d=d, bytes=4 if wide else 2))
    rows, most = n // m * s, here.pop("BLOCK_R")
    r = min(most, max(16, power_of_2(rows)))
    programs, room = b * m * cdiv(rows, r), table.shape[1] * shape.page
    steps = cdiv(shape.ring or room, shape.group if shape.bits else here["BLOCK_N"])
    splits = _splits(q.device, steps, programs, here.pop("PER_SM"), here.pop("SPLIT_STEPS")) + (shape.bits > 0)
    align = alignment(q.stride()[:3])
    numbers = (
        *[stride // align for stride in q.stride()[:3]], m, n // m, s, pool.shape[0], table.shape[1],
        shape.page, shape.ring, shape.sinks, shape.residual, room, splits,
    )  # fmt: skip
    meta = {
        "D": d, "A": max(16, power_of_2(d)), "R": r, "G": shape.group, "WIDE": wide, "PAGED": table.shape[1] > 1,
        "RING": shape.ring > 0, "SINKS": shape.sinks > 0, "ALIGN": align, **here,
        **({"BITS": shape.bits} if shape.bits else {}),
    }  # fmt: skip
    parts, grid = programs * splits * r * (d + 2), (programs, splits)

    def run(q, o, lse, length, table, storage, scale: float, window: int) -> None:
        part = q.new_empty(parts, dtype=torch.float32)
        launch(
            kernel, grid, q, o, lse, part, counters(programs, q.device), length, table, *[storage[i] for i in taken],
            *numbers, scale, window, **meta,
        )  # fmt: skip

    return run
