"""Lowering on a GPU: kernels that read a mask's description and write rows, counts, ranges and box attributes.

A token's place is arithmetic on the description: its segment by binary search, then a code (where it sorts) and the
interval of codes it sees. Values (kept tokens, ids) are read by the kernels alone. Every index that comes out of a
tensor is clamped to the tensor it goes into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import bind, require
from vkernels.masks import description
from vkernels.triton.launch import arch, cdiv, launch
from vkernels.triton.scan import clamp, count_below, exclusive_count, sum_of
from vkernels.triton.tiles import tiles

FIELDS: tl.constexpr = tl.constexpr(description.FIELDS)
BLOCKS: tl.constexpr = tl.constexpr(description.BLOCKS)
IDS: tl.constexpr = tl.constexpr(description.IDS)
INTERVAL: tl.constexpr = tl.constexpr(description.INTERVAL)
CLASS: tl.constexpr = tl.constexpr(description.CLASS)
BOX: tl.constexpr = tl.constexpr(description.BOX)
LEADER: tl.constexpr = tl.constexpr(description.LEADER)
LARGEST: tl.constexpr = tl.constexpr(2**31 - 1)

AS_IS: tl.constexpr = tl.constexpr(0)  # a code is a place already
BY_COUNT: tl.constexpr = tl.constexpr(1)  # a place is the number of kept tokens before it
BY_SEARCH: tl.constexpr = tl.constexpr(2)  # a place is the number of live codes below it


@triton.jit
def _mine(s, blocks, BLOCK: tl.constexpr):
    """(sample, its tokens or slots, which of them there are) of this program: `blocks` programs to a sample. int64."""
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample.to(tl.int64), token, token < s


@triton.jit
def _segment_of(token, live, segments_ptr, n_segments, steps):
    """(row of its segment, number inside it after the globals: negative for a global)."""
    row = count_below(segments_ptr, 0, FIELDS, n_segments, token, live, steps, True) - 1
    row = segments_ptr + clamp(row, 0, n_segments - 1) * FIELDS
    return row, token - tl.load(row, mask=live, other=0) - tl.load(row + 1, mask=live, other=0)


@triton.jit
def _relation(row, r, live, relations_ptr, n_relations):
    """(the r-th relation of a segment, whether it has one)."""
    first, count = tl.load(row + 5, mask=live, other=0), tl.load(row + 6, mask=live, other=0)
    return relations_ptr + clamp(first + r, 0, n_relations - 1) * FIELDS, live & (r < count)


@triton.jit
def _value(
    relation, x, sample, live, ends_ptr, n_ends, ids_ptr, n_ids, steps,
    HAS_BLOCKS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """The attribute of token `x` of its segment."""
    kind = tl.load(relation, mask=live, other=0)
    size, at = tl.load(relation + 2, mask=live, other=1), tl.load(relation + 5, mask=live, other=1)
    # Both fit 32 bits where the value is arithmetic; a 64-bit division is a call with a stack frame.
    value = (x.to(tl.int32) // clamp(at, 1, LARGEST).to(tl.int32) % clamp(size, 1, LARGEST).to(tl.int32)).to(tl.int64)
    if HAS_BLOCKS:
        first = clamp(at, 0, n_ends - 1) + 1
        ended = count_below(
            ends_ptr, first, 1, clamp(size, 0, n_ends - first), x, live & (kind == BLOCKS), steps, True
        )  # fmt: skip
        value = tl.where(kind == BLOCKS, ended, value)
    if HAS_IDS:
        index = at + sample * tl.load(relation + 6, mask=live, other=0) + x
        here = live & (kind == IDS) & (index >= 0) & (index < n_ids)
        value = tl.where(kind == IDS, tl.load(ids_ptr + index, mask=here, other=0).to(tl.int64), value)
    return value


@triton.jit
def _interval(
    relation, value, sample, n, live, ends_ptr, n_ends, ids_ptr, n_ids, steps,
    HAS_BLOCKS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """The tokens of a segment that a relation which grows with position lets a token of `value` see: half open."""
    kind = tl.load(relation, mask=live, other=0)
    lo, hi = tl.load(relation + 3, mask=live, other=0), tl.load(relation + 4, mask=live, other=0)
    at = tl.load(relation + 5, mask=live, other=1)
    start, end = (value + lo) * at, (value + hi + 1) * at
    if HAS_BLOCKS:
        size = tl.load(relation + 2, mask=live, other=1)
        here = live & (kind == BLOCKS)
        first, last = clamp(value + lo, 0, size) + at, clamp(value + hi + 1, 0, size) + at
        start = tl.where(here, tl.load(ends_ptr + clamp(first, 0, n_ends - 1), mask=here, other=0), start)
        end = tl.where(here, tl.load(ends_ptr + clamp(last, 0, n_ends - 1), mask=here, other=0), end)
    if HAS_IDS:
        here = live & (kind == IDS)
        row = clamp(at + sample * tl.load(relation + 6, mask=live, other=0), 0, n_ids)
        length = clamp(n, 0, n_ids - row)
        start = tl.where(here, count_below(ids_ptr, row, 1, length, value + lo, here, steps, False), start)
        end = tl.where(here, count_below(ids_ptr, row, 1, length, value + hi, here, steps, True), end)
    return start, end


@triton.jit
def _place(
    token, sample, live, segments_ptr, n_segments, relations_ptr, n_relations, most, ends_ptr, n_ends, ids_ptr, n_ids,
    steps, HAS_BLOCKS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """(code, first code seen, one past the last code seen, first code of the segment, its globals, is it one).

    code = base + globals + class * tokens + order: ascending codes are the processing order. A global sees every code.
    """
    row, x = _segment_of(token, live, segments_ptr, n_segments, steps)
    heads, n = tl.load(row + 1, mask=live, other=0), tl.load(row + 2, mask=live, other=0)
    base, codes = tl.load(row + 3, mask=live, other=0), tl.load(row + 4, mask=live, other=0)
    head = x < 0
    order = tl.maximum(x, 0)
    start, end, cell = order * 0, n, order * 0
    for r in range(most):
        relation, here = _relation(row, r, live & (x >= 0), relations_ptr, n_relations)
        role = tl.load(relation + 1, mask=here, other=BOX)
        here = here & (role != BOX)
        value = _value(relation, x, sample, here, ends_ptr, n_ends, ids_ptr, n_ids, steps, HAS_BLOCKS, HAS_IDS)
        low, high = _interval(
            relation, value, sample, n, here & (role == INTERVAL), ends_ptr, n_ends, ids_ptr, n_ids, steps,
            HAS_BLOCKS, HAS_IDS,
        )  # fmt: skip
        cuts = here & (role == INTERVAL)
        start, end = tl.where(cuts, tl.maximum(start, low), start), tl.where(cuts, tl.minimum(end, high), end)
        leads = here & (role == LEADER)
        order = tl.where(leads, value, order)
        lo, hi = tl.load(relation + 3, mask=leads, other=0), tl.load(relation + 4, mask=leads, other=0)
        start, end = tl.where(leads, clamp(value + lo, 0, n), start), tl.where(leads, clamp(value + hi + 1, 0, n), end)
        size = tl.maximum(tl.load(relation + 2, mask=here, other=1), 1)
        cell = tl.where(here & (role == CLASS), cell * size + value, cell)
    offset = base + heads + cell * n
    code = tl.where(head, base + heads + x, offset + order)
    return code, tl.where(head, base, offset + start), tl.where(head, base + codes, offset + end), base, heads, head


@triton.jit
def _locate(
    code, sample, s, live, before_ptr, ladder_ptr, steps, LOCATE: tl.constexpr
):  # fmt: skip
    """Where a code stands among the live keys of its sample."""
    if LOCATE == AS_IS:
        place = code
    elif LOCATE == BY_COUNT:
        place = tl.load(before_ptr + sample * (s + 1) + clamp(code, 0, s), mask=live, other=0).to(tl.int64)
    else:
        place = count_below(ladder_ptr, sample * s, 1, s, code, live, steps, False)
    return clamp(place, 0, s)


@triton.jit(do_not_specialize=["s", "blocks", "stride_k"])
def _count_kept_kernel(keep_ptr, kept_ptr, s, blocks, stride_k, BLOCK: tl.constexpr):
    """kept[sample, block]: how many tokens of each block stay."""
    sample, token, live = _mine(s, blocks, BLOCK)
    keep = tl.load(keep_ptr + sample * stride_k + token, mask=live, other=0)
    tl.store(kept_ptr + tl.program_id(0), tl.sum((keep != 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["s", "blocks", "stride_k"])
def _compact_kernel(
    keep_ptr, kept_ptr, rows_ptr, count_ptr, before_ptr, s, blocks, stride_k, BLOCK: tl.constexpr
):  # fmt: skip
    """A stable partition: kept tokens in order, then dropped tokens in order; how many are kept, in all and before each
    token."""
    sample, token, live = _mine(s, blocks, BLOCK)
    block = tl.program_id(0) % blocks
    mine = kept_ptr + sample * blocks
    ahead = sum_of(mine, 0, block, BLOCK)
    count = ahead + sum_of(mine, block, blocks, BLOCK)
    keep = (tl.load(keep_ptr + sample * stride_k + token, mask=live, other=0) != 0).to(tl.int32)
    before = ahead + exclusive_count(keep)
    place = tl.where(keep != 0, before, count + token - before)
    tl.store(rows_ptr + sample * s + place, token.to(tl.int32), mask=live)
    to = before_ptr + sample * (s + 1)
    tl.store(to + token, before, mask=live)
    if block == 0:
        tl.store(to + s, count)
        tl.store(count_ptr + sample, count)


@triton.jit(do_not_specialize=["n_segments", "n_relations", "most", "n_ends", "n_ids", "steps", "s", "blocks",
                               "stride_k", "past"])  # fmt: skip
def _codes_kernel(
    segments_ptr, relations_ptr, ends_ptr, ids_ptr, keep_ptr, out_ptr,
    n_segments, n_relations, most, n_ends, n_ids, steps, s, blocks, stride_k, past,
    HAS_BLOCKS: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each token sorts by: its code, and `past` where it is dropped."""
    sample, token, live = _mine(s, blocks, BLOCK)
    index = sample * s + token
    code, _, _, _, _, _ = _place(
        token, sample, live, segments_ptr, n_segments, relations_ptr, n_relations, most, ends_ptr, n_ends,
        ids_ptr, n_ids, steps, HAS_BLOCKS, HAS_IDS,
    )  # fmt: skip
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + sample * stride_k + token, mask=live, other=0)
        code = tl.where(keep != 0, code, past)
    tl.store(out_ptr + index, code, mask=live)


@triton.jit(do_not_specialize=["n_segments", "n_relations", "most", "n_ends", "n_ids", "steps", "s", "blocks"])
def _ranges_kernel(
    segments_ptr, relations_ptr, ends_ptr, ids_ptr, rows_ptr, count_ptr, before_ptr, ladder_ptr, out_ptr,
    n_segments, n_relations, most, n_ends, n_ids, steps, s, blocks,
    HAS_BLOCKS: tl.constexpr, HAS_IDS: tl.constexpr, LOCATE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key intervals of each query in processing order; the global keys' interval first, where R is 2."""
    sample, slot, live = _mine(s, blocks, BLOCK)
    index = sample * s + slot
    token = slot
    if rows_ptr is not None:
        token = clamp(tl.load(rows_ptr + index, mask=live, other=0).to(tl.int64), 0, s - 1)
    _, start, end, base, heads, head = _place(
        token, sample, live, segments_ptr, n_segments, relations_ptr, n_relations, most, ends_ptr, n_ends,
        ids_ptr, n_ids, steps, HAS_BLOCKS, HAS_IDS,
    )  # fmt: skip
    seen = live
    if count_ptr is not None:
        seen = live & (slot < tl.load(count_ptr + sample))
    first = _locate(start, sample, s, seen, before_ptr, ladder_ptr, steps, LOCATE)
    last = tl.maximum(first, _locate(end, sample, s, seen, before_ptr, ladder_ptr, steps, LOCATE))
    to = out_ptr + index * (2 * R)
    if R == 2:
        front = _locate(base, sample, s, seen, before_ptr, ladder_ptr, steps, LOCATE)
        back = _locate(base + heads, sample, s, seen, before_ptr, ladder_ptr, steps, LOCATE)
        tl.store(to, tl.where(seen, front, 0).to(tl.int32), mask=live)
        tl.store(to + 1, tl.where(seen, tl.where(head, last, back), 0).to(tl.int32), mask=live)
        first = tl.where(head, last, first)
    tl.store(to + 2 * R - 2, tl.where(seen, first, 0).to(tl.int32), mask=live)
    tl.store(to + 2 * R - 1, tl.where(seen, last, 0).to(tl.int32), mask=live)


@triton.jit(do_not_specialize=["n_segments", "n_relations", "most", "n_ends", "n_ids", "steps", "s", "blocks",
                               "columns"])  # fmt: skip
def _box_kernel(
    segments_ptr, relations_ptr, ends_ptr, ids_ptr, rows_ptr, attr_ptr, flag_ptr,
    n_segments, n_relations, most, n_ends, n_ids, steps, s, blocks, columns,
    HAS_BLOCKS: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """attr[sample, column, slot], 0 where the token's segment has no relation there; and which tokens are global."""
    sample, slot, live = _mine(s, blocks, BLOCK)
    index = sample * s + slot
    token = slot
    if rows_ptr is not None:
        token = clamp(tl.load(rows_ptr + index, mask=live, other=0).to(tl.int64), 0, s - 1)
    row, x = _segment_of(token, live, segments_ptr, n_segments, steps)
    for column in range(columns):
        attribute = token * 0
        for r in range(most):
            relation, here = _relation(row, r, live & (x >= 0), relations_ptr, n_relations)
            here = here & (tl.load(relation + 1, mask=here, other=0) == BOX)
            here = here & (tl.load(relation + 7, mask=here, other=0) == column)
            value = _value(relation, x, sample, here, ends_ptr, n_ends, ids_ptr, n_ids, steps, HAS_BLOCKS, HAS_IDS)
            attribute = tl.where(here, value, attribute)
        tl.store(attr_ptr + (sample * columns + column) * s + slot, attribute.to(tl.int32), mask=live)
    if flag_ptr is not None:
        tl.store(flag_ptr + index, (x < 0).to(tl.uint8), mask=live)


def _checked(segments: Tensor, relations: Tensor, ends: Tensor, ids: Tensor, layout: list[int]) -> tuple[int, ...]:
    """(samples, tokens, most relations), after what keeps a direct call inside its tensors."""
    name = "lower_mask"
    bind(name, ("segments", segments, f"x {FIELDS.value}"), ("relations", relations, f"y {FIELDS.value}"),
         ("ends", ends, "e"), ("ids", ids, "i"))  # fmt: skip
    for argument, x, dtype in (
        ("segments", segments, torch.int64), ("relations", relations, torch.int64), ("ends", ends, torch.int64),
        ("ids", ids, torch.int32),
    ):  # fmt: skip
        require(x.dtype == dtype and x.is_contiguous(), name, argument, f"be contiguous {dtype}", x.dtype, TypeError)
        require(x.numel() > 0, name, argument, "hold at least one element", tuple(x.shape))
    good = len(layout) == 4 and all(number >= 0 for number in layout) and layout[1] < 2**31
    require(good, name, "layout", "be [samples, tokens, relations, sources] with tokens below 2^31", layout)
    return layout[0], layout[1], min(layout[2], relations.shape[0])


def _table(segments: Tensor, relations: Tensor, ends: Tensor, ids: Tensor, layout: list[int], block: int):
    """What every kernel that places tokens takes: its grid, its numbers, its constants."""
    p, s, most = _checked(segments, relations, ends, ids, layout)
    longest = max(s, segments.shape[0], ends.shape[0], ids.shape[0])
    blocks = cdiv(s, block)
    steps = longest.bit_length() + 1
    numbers = (segments.shape[0], relations.shape[0], most, ends.shape[0], ids.shape[0], steps, s, blocks)
    constants = {"HAS_BLOCKS": bool(layout[3] & BLOCKS.value), "HAS_IDS": bool(layout[3] & IDS.value)}
    return (p * blocks,), numbers, constants


def _tiles(kernel: str, x: Tensor) -> dict[str, int]:
    return tiles("lower_mask", kernel, arch(x.device))


def compact(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """keep bool [p, s] -> rows int32 [p, s], count [p], and before [p, s + 1]."""
    bind("lower_mask", ("keep", keep, "p s"))
    require(keep.dtype == torch.bool, "lower_mask", "keep", "be bool", keep.dtype, TypeError)
    p, s = keep.shape
    keep = keep if s <= 1 or keep.stride(1) == 1 else keep.contiguous()
    here = _tiles("_compact_kernel", keep)
    blocks = max(cdiv(s, here["BLOCK"]), 1)
    rows, count, before, kept = (
        torch.empty(shape, dtype=torch.int32, device=keep.device) for shape in ((p, s), (p,), (p, s + 1), (p, blocks))
    )
    where = (s, blocks, keep.stride(0) if p > 1 else 0)
    launch(_count_kept_kernel, (p * blocks,), keep, kept, *where, **_tiles("_count_kept_kernel", keep))
    launch(_compact_kernel, (p * blocks,), keep, kept, rows, count, before, *where, **here)
    return rows, count, before


def codes(segments, relations, ends, ids, keep: Tensor | None, past: int, layout: list[int]) -> Tensor:
    """int64 [p, s]: what each token sorts by."""
    here = _tiles("_codes_kernel", segments)
    grid, numbers, constants = _table(segments, relations, ends, ids, layout, here["BLOCK"])
    p, s = layout[:2]
    bind("lower_mask", ("segments", segments, "x f"), ("keep", keep, f"{p} {s}"))
    if keep is not None:
        require(keep.dtype == torch.bool, "lower_mask", "keep", "be bool", keep.dtype, TypeError)
        keep = keep if s <= 1 or keep.stride(1) == 1 else keep.contiguous()
    out = torch.empty(p, s, dtype=torch.int64, device=segments.device)
    stride = 0 if keep is None or p == 1 else keep.stride(0)
    launch(
        _codes_kernel, grid,
        segments, relations, ends, ids, keep, out, *numbers, stride, past, **constants, **here,
    )  # fmt: skip
    return out


def ranges(
    segments, relations, ends, ids, rows: Tensor | None, count: Tensor | None, before: Tensor | None,
    ladder: Tensor | None, intervals: int, layout: list[int],
) -> Tensor:  # fmt: skip
    """int32 [p, s, 2 * intervals], in processing order."""
    here = _tiles("_ranges_kernel", segments)
    grid, numbers, constants = _table(segments, relations, ends, ids, layout, here["BLOCK"])
    p, s = layout[:2]
    bind(
        "lower_mask", ("segments", segments, "x f"), ("rows", rows, f"{p} {s}"), ("count", count, f"{p}"),
        ("before", before, f"{p} {s + 1}"), ("ladder", ladder, f"{p} {s}"),
    )  # fmt: skip
    for name, x in (("rows", rows), ("count", count), ("before", before), ("ladder", ladder)):
        require(x is None or x.is_contiguous(), "lower_mask", name, "be contiguous", None if x is None else x.stride())
    require(intervals in (1, 2), "lower_mask", "intervals", "be 1 or 2", intervals)
    out = torch.empty(p, s, 2 * intervals, dtype=torch.int32, device=segments.device)
    locate = BY_COUNT if before is not None else BY_SEARCH if ladder is not None else AS_IS
    launch(
        _ranges_kernel, grid,
        segments, relations, ends, ids, rows, count, before, ladder, out, *numbers,
        **constants, LOCATE=locate.value, R=intervals, **here,
    )  # fmt: skip
    return out


def box(
    segments, relations, ends, ids, rows: Tensor | None, columns: int, flags: bool, layout: list[int]
) -> tuple[Tensor, Tensor]:
    """(attributes int32 [p, columns, s], flags uint8 [p, s] or [0]), in processing order."""
    here = _tiles("_box_kernel", segments)
    grid, numbers, constants = _table(segments, relations, ends, ids, layout, here["BLOCK"])
    p, s = layout[:2]
    bind("lower_mask", ("segments", segments, "x f"), ("rows", rows, f"{p} {s}"))
    require(rows is None or rows.is_contiguous(), "lower_mask", "rows", "be contiguous", rows is None or rows.stride())
    require(columns >= 0, "lower_mask", "columns", "be at least 0", columns)
    attr = torch.empty(p, columns, s, dtype=torch.int32, device=segments.device)
    flag = torch.empty((p, s) if flags else (0,), dtype=torch.uint8, device=segments.device)
    launch(
        _box_kernel, grid,
        segments, relations, ends, ids, rows, attr, flag if flags else None, *numbers, columns, **constants, **here,
    )  # fmt: skip
    return attr, flag
