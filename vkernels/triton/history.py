"""The tokens a KVCache holds, as kernels read them: which, where, and who may see them.

Lengths and tables are memory of the device: nothing a host could have checked. Every index made from them is clamped to
the storage, so that a wrong value gives wrong numbers and no access outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import bind, require, same_dtype
from vkernels.kv_cache import GROUPS, STORAGE, Layout, words


@triton.jit
def seen_range(length, row, s, window):
    """Last position each query row sees, and the last that is hidden from it. Rows are s queries, again and again."""
    last = length - s + row % s
    return last, tl.where(window > 0, last - window, -1)


@triton.jit
def history_range(length, s, window, sinks, residual, room, ring, GROUP: tl.constexpr, RING: tl.constexpr):
    """First and one-past-last history index that is kept, in the storage, and in anyone's window."""
    end = tl.maximum(length - sinks, 0)
    if GROUP > 1:
        end = tl.maximum(end - residual, 0) // GROUP * GROUP
    begin = 0
    if RING:
        begin = tl.maximum(end - ring, 0)
    else:
        end = tl.minimum(end, room)
    if window > 0:
        visible = (tl.maximum(length - s - window + 1 - sinks, 0)) // GROUP * GROUP
        begin = tl.minimum(tl.maximum(begin, visible), end)
    return begin, end


@triton.jit
def recent_range(length, s, window, sinks, residual, GROUP: tl.constexpr):
    """First history index kept uncoded and in anyone's window, and how many there are."""
    after = tl.maximum(length - sinks, 0)
    start = tl.maximum(after - residual, 0) // GROUP * GROUP
    if window > 0:
        start = tl.minimum(tl.maximum(start, length - s - window + 1 - sinks), after)
    return start, after - start


@triton.jit
def share_of(count, split, splits):
    """The part of `count` steps that `split` of `splits` takes: from, to, and how many splits have any."""
    each = tl.maximum((count + splits - 1) // splits, 1)
    return tl.minimum(split * each, count), tl.minimum((split + 1) * each, count), (count + each - 1) // each


@triton.jit
def ring_slot(start, offset, ring):
    """(start + offset) modulo ring, for start and offset below ring, without a sum that could overflow."""
    return tl.where(offset >= ring - start, offset - (ring - start), start + offset)


@triton.jit
def page_of(table_ptr, sample, slot, live, page, table_pages, pages, PAGED: tl.constexpr):
    """(page in the pool, row in it) of history slots."""
    if PAGED:
        column = slot // page
        entry = tl.load(table_ptr + sample * table_pages + tl.minimum(column, table_pages - 1), mask=live, other=0)
        row = slot - column * page
    else:
        entry = tl.load(table_ptr + sample * table_pages)
        row = slot
    return tl.minimum(tl.maximum(entry, 0), pages - 1).to(tl.int64), row


def checked_cache(
    op: str, length: Tensor, table: Tensor, storage: Sequence[Tensor | None], layout: list[int], m: int, d: int
) -> Layout:
    """What keeps kernels inside a cache's storage, for callers who come past the public function."""
    require(len(layout) == 6 and len(storage) == len(STORAGE), op, "layout", "be that of a KVCache", layout)
    require(all(0 <= x < 2**31 for x in layout), op, "layout", "hold numbers below 2^31", layout)
    shape = Layout(*layout)
    bits, g, page = shape.bits, shape.group, shape.page
    require(bits in (0, 2, 4, 8), op, "bits", "be 0, 2, 4 or 8", bits)
    require(g in GROUPS if bits else g == 1, op, "group", "be 32, 64 or 128, or 1 at full precision", g)
    fits = all(x % g == 0 for x in (shape.residual, page, shape.ring)) and page > 0 and (bits or not shape.residual)
    require(bool(fits), op, "layout", "have residual, page and ring in multiples of group", layout)
    require(0 < d <= 256 and d % 8 == 0, op, "d", "be a multiple of 8 up to 256", d)
    b = bind(op, ("length", length, "b"), ("table", table, "b p"))["b"]
    for name, x in (("length", length), ("table", table)):
        require(x.dtype == torch.int32 and x.is_contiguous(), op, name, "be contiguous int32", x.dtype, TypeError)
    at = dict(zip(STORAGE, storage, strict=True))
    pool = at["k_codes" if bits else "k_rows"]
    pages = pool.shape[0] if pool is not None and pool.dim() else 0
    require(pages > 0, op, "k_codes" if bits else "k_rows", "be given", None if pool is None else tuple(pool.shape))
    head, kept, sink = f"{pages} {m} {page // g}", f"{b} {m} {shape.residual + g} {d}", f"{b} {m} {shape.sinks} {d}"
    shapes = {
        "k_codes": f"{head} {words(d, bits)} {g}",
        "v_codes": f"{head} {words(g, bits)} {-(-d // 16) * 16}",
        "k_scale": f"{head} 2 {d}",
        "v_scale": f"{head} 2 {-(-d // g)} {g}",
        "k_recent": kept,
        "v_recent": kept,
    }
    shapes = shapes if bits else {"k_rows": f"{head} {d}", "v_rows": f"{head} {d}"}
    shapes |= {"k_sink": sink, "v_sink": sink} if shape.sinks else {}
    held = {name: tensor for name in shapes if (tensor := at[name]) is not None and tensor.is_contiguous()}
    for name in shapes:
        require(name in held, op, name, "be given and contiguous", "another")
    bind(op, ("length", length, "b"), *((name, held[name], axes) for name, axes in shapes.items()))
    kinds = {"k_codes": torch.int32, "v_codes": torch.int32, "k_scale": torch.float16, "v_scale": torch.float16}
    for name, x in held.items():
        kind = kinds.get(name, x.dtype)
        require(x.dtype == kind, op, name, f"have dtype {kind}", x.dtype, TypeError)
    same_dtype(op, *((name, x) for name, x in held.items() if name not in kinds))
    room = table.shape[1] * page
    require(0 < room < 2**31 - 2**16, op, "table", "give a sequence 1 to 2^31 - 2^16 tokens", room)
    require(shape.ring <= room, op, "ring", "fit the pages of the table", shape.ring)
    return shape
