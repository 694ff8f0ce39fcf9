"""kv_append on Triton: one launch that codes the groups that are now complete and keeps the rest.

A slot of the recent window may hold a token that still has to be coded and be due for a new one. The token of history
group G takes the slot of group G - W (W groups fit the window), so one program codes G - W, then keeps G: no other
program reads or writes that slot, and a bulk append still has a program per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import bind, require, same_dtype
from vkernels.kv_cache import Layout
from vkernels.library import unit_stride
from vkernels.remember import planned
from vkernels.triton.history import checked_cache
from vkernels.triton.launch import alignment, arch, cdiv, launch, power_of_2
from vkernels.triton.quantize import pack_columns, pack_rows, quantise
from vkernels.triton.tiles import tiles

NAME = "kv_append"


@triton.jit
def _lengths(length_ptr, count_ptr, sample, s):
    """Tokens that were there and tokens that come; in the call's bounds, whatever the memory says."""
    old = tl.maximum(tl.load(length_ptr + sample), 0).to(tl.int64)
    count = tl.minimum(tl.maximum(tl.load(count_ptr + sample), 0), s).to(tl.int64)
    return old, count


@triton.jit
def _page(table_ptr, sample, slot, live, page, table_pages, pages):
    """(page of the pool, whether it is one) of history slots; one beyond the table, or with no page, is not there."""
    column = slot // page
    there = live & (column < table_pages)
    entry = tl.load(table_ptr + sample * table_pages + column, mask=there, other=-1).to(tl.int64)
    return entry, there & (entry >= 0) & (entry < pages)


@triton.jit(
    do_not_specialize=["s", "tokens", "stride_kb", "stride_vb", "page", "ring", "sinks", "pages", "table_pages"]
)
def _append_rows_kernel(
    k_ptr, v_ptr, count_ptr, length_ptr, table_ptr, k_rows_ptr, v_rows_ptr, k_sink_ptr, v_sink_ptr,
    stride_kb, stride_ks, stride_km, stride_vb, stride_vs, stride_vm,
    tokens, s, m, page, ring, sinks, pages, table_pages,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_call = row < tokens
    sample, token = row // s, row % s
    old = tl.maximum(tl.load(length_ptr + sample, mask=in_call, other=0), 0).to(tl.int64)
    count = tl.load(count_ptr + sample, mask=in_call, other=0).to(tl.int64)
    live = in_call & (token < count)
    index = old + token - sinks
    kept = live & (index >= 0)
    slot = tl.maximum(index, 0)
    if RING:
        kept &= index >= old + tl.minimum(count, s) - sinks - ring
        slot = slot % ring
    entry, there = _page(table_ptr, sample, slot, kept, page, table_pages, pages)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    inside = (head < m)[None, :, None] & (column < D)[None, None, :]
    head = head.to(tl.int64)
    to = ((entry * m)[:, None] + head[None, :]) * page + (slot % page)[:, None]
    to = (to * D)[:, :, None] + column[None, None, :]
    k_at = (sample * stride_kb + token * stride_ks)[:, None] + (head * stride_km)[None, :]
    v_at = (sample * stride_vb + token * stride_vs)[:, None] + (head * stride_vm)[None, :]
    loaded = live[:, None, None] & inside
    k = tl.load(k_ptr + (k_at * ALIGN)[:, :, None] + column[None, None, :], mask=loaded, other=0.0)
    v = tl.load(v_ptr + (v_at * ALIGN)[:, :, None] + column[None, None, :], mask=loaded, other=0.0)
    stored = there[:, None, None] & inside
    tl.store(k_rows_ptr + to, k, mask=stored)
    tl.store(v_rows_ptr + to, v, mask=stored)
    if SINKS:
        to = ((sample * m)[:, None] + head[None, :]) * sinks + (old + token)[:, None]
        to = (to * D)[:, :, None] + column[None, None, :]
        stored = (live & (index < 0))[:, None, None] & inside
        tl.store(k_sink_ptr + to, k, mask=stored)
        tl.store(v_sink_ptr + to, v, mask=stored)


@triton.jit
def _rows_of_call(x_ptr, stride, position, old, count, column, live, D: tl.constexpr):
    """Rows [tokens, columns] of the call at these positions, and which of them are there."""
    token = position - old
    here = live & (token >= 0) & (token < count)
    inside = here[:, None] & (column < D)[None, :]
    return tl.load(x_ptr + (token * stride)[:, None] + column[None, :], mask=inside, other=0.0), here, inside


@triton.jit
def _code_keys(x, t, column, place, codes_ptr, scale_ptr, GROUP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Keys [group, columns]: per channel over the tokens of the group."""
    L: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = (D + L - 1) // L
    codes, delta, zero = quantise(x, (column < D)[None, :] & (t >= 0)[:, None], 0, BITS)
    tl.store(scale_ptr + place * (2 * D) + column, delta, mask=column < D)
    tl.store(scale_ptr + place * (2 * D) + D + column, zero, mask=column < D)
    word = tl.min(column, 0) // L + tl.arange(0, x.shape[1] // L)
    to = (place * WORDS + word)[None, :] * GROUP + t[:, None]
    tl.store(codes_ptr + to, pack_columns(codes, BITS), mask=(word < WORDS)[None, :])


@triton.jit
def _code_values(x, t, column, place, codes_ptr, scale_ptr, GROUP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Values [tokens, columns]: per token over groups of channels."""
    L: tl.constexpr = 32 // BITS
    T: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    PADDED: tl.constexpr = (D + 15) // 16 * 16
    inside = tl.reshape((column < D)[None, :] & (t >= 0)[:, None], [T, C // GROUP, GROUP])
    codes, delta, zero = quantise(tl.reshape(x, [T, C // GROUP, GROUP]), inside, 2, BITS)
    group = tl.min(column, 0) // GROUP + tl.arange(0, C // GROUP)
    to = (place * (2 * GROUPS) + group)[None, :] * GROUP + t[:, None]
    tl.store(scale_ptr + to, delta, mask=(group < GROUPS)[None, :])
    tl.store(scale_ptr + to + GROUPS * GROUP, zero, mask=(group < GROUPS)[None, :])
    word = tl.min(t, 0) // L + tl.arange(0, T // L)
    to = (place * (GROUP // L) + word)[:, None] * PADDED + column[None, :]
    tl.store(codes_ptr + to, pack_rows(tl.reshape(codes, [T, C]), BITS), mask=(column < PADDED)[None, :])


@triton.jit
def _append_part(
    x_ptr, stride, codes_ptr, scale_ptr, recent_ptr, sink_ptr, table_ptr, sample, head, m, old, count, task, tasks,
    t, column, residual, sinks, page, ring, pages, table_pages,
    KEYS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, RING: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Tokens t and channels `column` of one task: code a group, then keep what takes its place in the window."""
    window = residual + GROUP
    end = tl.maximum(tl.maximum(old + count - sinks, 0) - residual, 0) // GROUP * GROUP
    first = tl.maximum(tl.maximum(old - sinks, 0) - residual, 0) // GROUP * GROUP
    if RING:
        first = tl.maximum(first, end - ring)
    index = tl.minimum(first, end - window) + task * GROUP  # of the group to code; below `first` there is none
    recent_at = (sample * m + head) * window
    if (index >= first) & (index < end):
        x, _, _ = _rows_of_call(x_ptr, stride, index + sinks + t, old, count, column, t >= 0, D)
        was_here = index + sinks + t < old
        at = (recent_at + (index + t) % window) * D
        inside = was_here[:, None] & (column < D)[None, :]
        past = tl.load(recent_ptr + at[:, None] + column[None, :], mask=inside, other=0.0)
        x = tl.where(was_here[:, None], past.to(tl.float32), x.to(tl.float32))
        slot = index % ring if RING else index
        entry, there = _page(table_ptr, sample, slot, index >= 0, page, table_pages, pages)
        place = (entry * m + head) * (page // GROUP) + slot % page // GROUP
        if there:
            if KEYS:
                _code_keys(x, t, column, place, codes_ptr, scale_ptr, GROUP, D, BITS)
            else:
                _code_values(x, t, column, place, codes_ptr, scale_ptr, GROUP, D, BITS)
    tl.debug_barrier()  # the window is read above and written below, not always by the same thread
    if (task < tasks) & (index < end):
        later = index + window + t
        x, _, inside = _rows_of_call(x_ptr, stride, later + sinks, old, count, column, later >= end, D)
        at = (recent_at + tl.maximum(later, 0) % window) * D
        tl.store(recent_ptr + at[:, None] + column[None, :], x, mask=inside)
    if SINKS:  # noqa: SIM102 (known to the compiler; the next is not)
        if task >= tasks:
            position = old + (task - tasks) * GROUP + t
            x, _, inside = _rows_of_call(x_ptr, stride, position, old, count, column, position < sinks, D)
            at = ((sample * m + head) * sinks + position) * D
            tl.store(sink_ptr + at[:, None] + column[None, :], x, mask=inside)


@triton.jit(do_not_specialize=[
    "s", "tasks", "all_tasks", "stride_kb", "stride_vb", "residual", "sinks", "page", "ring", "pages", "table_pages",
])  # fmt: skip
def _append_codes_kernel(
    k_ptr, v_ptr, count_ptr, length_ptr, table_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr,
    k_recent_ptr, v_recent_ptr, k_sink_ptr, v_sink_ptr,
    stride_kb, stride_ks, stride_km, stride_vb, stride_vs, stride_vm,
    s, m, tasks, all_tasks, residual, sinks, page, ring, pages, table_pages,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr,
    ALIGN: tl.constexpr, KEY_C: tl.constexpr, VALUE_T: tl.constexpr, VALUE_C: tl.constexpr,
):  # fmt: skip
    KEY_PARTS: tl.constexpr = (D + KEY_C - 1) // KEY_C
    HALVES: tl.constexpr = GROUP // VALUE_T
    PARTS: tl.constexpr = KEY_PARTS + HALVES * ((D + VALUE_C - 1) // VALUE_C)
    program = tl.program_id(0)
    part, program = program % PARTS, program // PARTS
    head, program = (program % m).to(tl.int64), program // m
    task, sample = (program % all_tasks).to(tl.int64), (program // all_tasks).to(tl.int64)
    old, count = _lengths(length_ptr, count_ptr, sample, s)
    if part < KEY_PARTS:
        _append_part(
            k_ptr + (sample * stride_kb + head * stride_km) * ALIGN, stride_ks * ALIGN,
            k_codes_ptr, k_scale_ptr, k_recent_ptr, k_sink_ptr, table_ptr, sample, head, m, old, count, task, tasks,
            tl.arange(0, GROUP), part * KEY_C + tl.arange(0, KEY_C), residual, sinks, page, ring, pages, table_pages,
            True, GROUP, D, BITS, RING, SINKS,
        )  # fmt: skip
    else:
        part = part - KEY_PARTS
        _append_part(
            v_ptr + (sample * stride_vb + head * stride_vm) * ALIGN, stride_vs * ALIGN,
            v_codes_ptr, v_scale_ptr, v_recent_ptr, v_sink_ptr, table_ptr, sample, head, m, old, count, task, tasks,
            part % HALVES * VALUE_T + tl.arange(0, VALUE_T), part // HALVES * VALUE_C + tl.arange(0, VALUE_C),
            residual, sinks, page, ring, pages, table_pages,
            False, GROUP, D, BITS, RING, SINKS,
        )  # fmt: skip


@planned
def kv_append(
    k: Tensor, v: Tensor, count: Tensor, length: Tensor, table: Tensor, *storage_and_layout: Any
) -> Callable[..., None]:
    *storage, layout = storage_and_layout
    sizes = bind(NAME, ("k", k, "b s m d"), ("v", v, "b s m d"), ("count", count, "b"), ("length", length, "b"))
    m, d = sizes["m"], sizes["d"]
    require(count.dtype == torch.int32, NAME, "count", "have dtype int32", count.dtype, TypeError)
    cache = checked_cache(NAME, length, table, storage, layout, m, d)
    kept = storage[6] if cache.bits else storage[0]
    same_dtype(NAME, ("cache", kept), ("k", k), ("v", v))
    strides = [stride for x in (k, v) for stride in unit_stride(x).stride()[:3]]
    align = alignment(strides)
    fixed = {"D": d, "RING": cache.ring > 0, "SINKS": cache.sinks > 0, "ALIGN": align}
    append = _append_codes if cache.bits else _append_rows
    return append(k, table, storage, cache, [stride // align for stride in strides], fixed)


def _append_rows(
    k: Tensor, table: Tensor, storage: Sequence[Tensor], cache: Layout, strides: list[int], fixed: dict[str, Any]
) -> Callable[..., None]:
    b, s, m, d = k.shape
    here = tiles(NAME, "_append_rows_kernel", arch(k.device), d=d)
    grid = cdiv(b * s, here["BLOCK_S"]), cdiv(m, here["BLOCK_H"])
    numbers = b * s, s, m, cache.page, cache.ring, cache.sinks, storage[0].shape[0], table.shape[1]
    meta = {**fixed, "BLOCK_D": power_of_2(d), **here}

    def run(k, v, count, length, table, *storage_and_layout) -> None:
        k_rows, v_rows, *_, k_sink, v_sink, _ = storage_and_layout
        if not cache.sinks:
            k_sink = v_sink = k_rows
        launch(
            _append_rows_kernel, grid, unit_stride(k), unit_stride(v), count.contiguous(), length, table,
            k_rows, v_rows, k_sink, v_sink, *strides, *numbers, **meta,
        )  # fmt: skip

    return run


def _append_codes(
    k: Tensor, table: Tensor, storage: Sequence[Tensor], cache: Layout, strides: list[int], fixed: dict[str, Any]
) -> Callable[..., None]:
    b, s, m, d = k.shape
    g, per = cache.group, 32 // cache.bits
    here = dict(tiles(NAME, "_append_codes_kernel", arch(k.device), d=g))
    key_c = max(per, min(here.pop("BLOCK_C"), power_of_2(d)))
    value_t, value_c = max(per, min(here.pop("BLOCK_T"), g)), max(key_c, g)
    parts = cdiv(d, key_c) + g // value_t * cdiv(d, value_c)
    # Groups that s tokens can complete, and those of the window; then the sinks they can fill.
    tasks = max(cdiv(s, g), cache.residual // g + 1)
    all_tasks = tasks + cdiv(min(s, cache.sinks), g)
    grid = (b * m * all_tasks * parts if s else 0,)
    numbers = (
        s, m, tasks, all_tasks, cache.residual, cache.sinks, cache.page, cache.ring, storage[2].shape[0],
        table.shape[1],
    )  # fmt: skip
    meta = {**fixed, "GROUP": g, "BITS": cache.bits, "KEY_C": key_c, "VALUE_T": value_t, "VALUE_C": value_c, **here}

    def run(k, v, count, length, table, *storage_and_layout) -> None:
        _, _, *codes, k_recent, v_recent, k_sink, v_sink, _ = storage_and_layout
        if not cache.sinks:
            k_sink = v_sink = k_recent
        launch(
            _append_codes_kernel, grid, unit_stride(k), unit_stride(v), count.contiguous(), length, table, *codes,
            k_recent, v_recent, k_sink, v_sink, *strides, *numbers, **meta,
        )  # fmt: skip

    return run
