"""Lowering: a VideoMask to a MaskPlan, on the target device, in O(N) memory, without host synchronisation.

Here with torch operations, which run anywhere and are the definition; `vkernels.masks.device` does it with kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vkernels.check import refusal
from vkernels.dispatch import Backend, choose
from vkernels.library import triton_why_not
from vkernels.masks.attributes import Axis, Relation, Segment, upload
from vkernels.masks.description import too_wide
from vkernels.masks.grid import Grid
from vkernels.masks.plan import Box, MaskPlan
from vkernels.masks.roles import Roles, box_columns, roles
from vkernels.masks.video_mask import VideoMask

Lowering = Callable[[VideoMask, torch.device], MaskPlan]


@dataclass(frozen=True)
class Call:
    mask: VideoMask
    device: torch.device


def lower_mask(mask: VideoMask, device: torch.device | str | None = None, *, backend: str | None = None) -> MaskPlan:
    """The plan of a mask: what attention kernels eat.

    Args:
        mask: who may see whom.
        device: where the plan's tensors are to be; None is the CPU.
        backend: "triton" (kernels, on an NVIDIA GPU), "reference" (torch operations, on any device), or None: on a GPU
            the first that can, elsewhere the reference. The plan is the same.

    Returns:
        MaskPlan, kept with the mask per device and backend: lowering twice costs nothing. Its memory grows with the
        number of tokens, never with its square. Gradients: none. Deterministic. Kept tokens and ids are never read
        back to the host, whichever device holds them.

    Raises:
        TypeError: `mask` is not a VideoMask. ValueError: no such backend. NoBackend: it cannot run here, and why.

    Example:
        >>> plan = vk.lower_mask(vk.VideoMask.frame_causal(vk.Grid(8, 16, 16)))

    Source: this library.
    """
    call = prepare(mask, device)
    return call.mask.plan(call.device, backend)


def prepare(mask: VideoMask, device: torch.device | str | None = None) -> Call:
    if not isinstance(mask, VideoMask):
        raise TypeError(refusal("lower_mask", "mask", "be a VideoMask", type(mask).__name__))
    return Call(mask, torch.device(device or "cpu"))


def lower(mask: VideoMask, device: torch.device, backend: str | None = None) -> MaskPlan:
    """Not cached; `VideoMask.plan` is."""
    call = Call(mask, device)
    if backend is None and device.type != "cuda":
        return BACKENDS[-1].run(call)  # Triton's interpreter is for tests, which ask for it
    return choose("lower_mask", BACKENDS, backend, call).run(call)


def _triton_why_not(call: Call) -> str | None:
    reason = triton_why_not(torch.empty(0, device=call.device))
    if reason is None and too_wide([segment for segment in call.mask.segments if segment.length]):
        return "the classes of the mask's ids need more than 62 bits, which only the reference ranks"
    return reason


def _by_kernels(mask: VideoMask, device: torch.device) -> MaskPlan:
    from vkernels.masks.device import plan_on_device

    if not mask.tokens or not mask.samples:
        return _by_intervals(mask, device)
    return plan_on_device(mask, device, "triton")


def _strides_first(call: Call, by_tensors: Lowering) -> MaskPlan:
    return _by_strides(call.mask, call.device, by_tensors) or by_tensors(call.mask, call.device)


BACKENDS = (
    Backend("triton", _triton_why_not, lambda call: _strides_first(call, _by_kernels)),
    Backend("reference", lambda call: None, lambda call: _strides_first(call, _by_intervals)),
)


def _by_strides(mask: VideoMask, device: torch.device, by_tensors: Lowering) -> MaskPlan | None:
    """One regular grid cut by `same` relations into groups that lie at a constant stride: no tensor is needed."""
    if mask.keep_k is not None or mask.keep_q is not None or len(mask.segments) != 1:
        return None
    segment = mask.segments[0]
    axes = [r.attribute for r in segment.relations if isinstance(r.attribute, Axis)]
    if segment.globals or not segment.tokens or not axes or len(axes) != len(segment.relations):
        return None
    grid = axes[0].grid
    same = {axis.axis for axis, r in zip(axes, segment.relations, strict=True) if r.same}
    real = [axis for axis in range(3) if grid.shape[axis] > 1]
    cut, free = [a for a in real if a in same], [a for a in real if a not in same]
    if not same or real not in (cut + free, free + cut):
        return None
    shape = tuple(grid.shape[axis] if axis in free else 1 for axis in range(3))
    part = Grid(*shape)
    groups = grid.tokens // part.tokens
    stride = (part.tokens, 1) if real == cut + free else (1, groups)
    inner = tuple(
        Relation(Axis(part, r.attribute.axis), r.lo, r.hi)
        for r in segment.relations
        if isinstance(r.attribute, Axis) and not r.same
    )
    plan = by_tensors(VideoMask((Segment(part.tokens, inner),)), device)
    if plan.q_rows is not None or plan.k_rows is not None or plan.box is not None:
        return None
    return replace(plan, s_q=grid.tokens, s_k=grid.tokens, groups=groups, q_stride=stride, k_stride=stride)


@dataclass
class _Part:
    """One segment in codes: code = base + class * tokens + order, ascending codes are the processing order.
    A class's half-open end may equal the next one's first code: `locate` counts the codes below it.

    Class 0 holds the global tokens. All tensors [p or 1, length].
    """

    code: Tensor
    start: Tensor
    end: Tensor
    codes: int  # how many codes the segment spans
    roles: Roles


def _code(segment: Segment, device: torch.device) -> _Part:
    role, leader = roles(segment), roles(segment).leader
    n, g = segment.tokens, segment.globals
    if leader is None:
        start = torch.zeros((1, n), dtype=torch.int64, device=device)
        end = start + n
        for relation in role.intervals:
            first, last = relation.attribute.interval(relation.lo, relation.hi, device)
            start, end = torch.maximum(start, first), torch.minimum(end, last)
        order = torch.arange(n, device=device)[None]
    else:
        order = leader.attribute.values(device)
        start, end = (order + leader.lo).clamp(0, n), (order + (leader.hi + 1)).clamp(0, n)
    cell: Tensor | None = None
    cells = 1
    for relation in role.classes:
        value = relation.attribute.values(device)
        cell = value if cell is None else cell * relation.attribute.size + value
        cells *= max(relation.attribute.size, 1)
        if cells > 2**20 and cells > n:
            cell, cells = _dense_rank(cell), n
    in_order = role.in_order  # codes are positions themselves, globals first: nothing to sort
    offset = g + (0 if cell is None else cell * n)
    code, start, end = order + offset, start + offset, end + offset
    codes = g + (n if in_order else cells * n)
    if g:
        first = torch.arange(g, device=device)[None]
        code, start, end = (
            torch.cat([ahead.expand(tail.shape[0], -1), tail], 1)
            for ahead, tail in ((first, code), (torch.zeros_like(first), start), (torch.full_like(first, codes), end))
        )
    return _Part(code, start, end, codes, role)


def _dense_rank(cell: Tensor) -> Tensor:
    ordered, order = torch.sort(cell, dim=1)
    step = torch.zeros_like(ordered)
    step[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(order).scatter_(1, order, step.cumsum(1))


def _by_intervals(mask: VideoMask, device: torch.device) -> MaskPlan:
    s, p = mask.tokens, mask.samples
    keep_k = None if mask.keep_k is None else upload(mask.keep_k, device).expand(p, -1)
    keep_q = None if mask.keep_q is None else upload(mask.keep_q, device).expand(p, -1)
    segments = [segment for segment in mask.segments if segment.length]
    parts = [_code(segment, device) for segment in segments]
    box = _box(segments, parts, p, device)
    in_order = all(part.roles.in_order for part in parts)
    everything = len(parts) <= 1 and all(part.roles.plain for part in parts)
    globals_ = any(segment.globals for segment in segments)

    rows: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    code = start = end = None
    base = 0
    if not everything:
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        for segment, part in zip(segments, parts, strict=True):
            for column, values in zip(columns, (part.code, part.start, part.end), strict=False):
                column.append((values + base).expand(p, -1))
            columns[3].append(torch.full((1, 1), base, device=device).expand(p, segment.length))
            base += part.codes
        code, start, end, origin = (torch.cat(column, 1) for column in columns)
    for side, keep in (("q", keep_q), ("k", keep_k)):
        if in_order or code is None:
            rows[side] = (None, None) if keep is None else _compacted(keep)
        else:
            key = code if keep is None else code.masked_fill(~keep, base)
            order = torch.sort(key, dim=1, stable=True).indices
            rows[side] = order, None if keep is None else keep.sum(1)
    (q_rows, q_count), (k_rows, k_count) = rows["q"], rows["k"]

    ranges = None
    if code is not None:
        if not in_order:
            assert k_rows is not None  # sorted above
            live = code if keep_k is None else code.masked_fill(~keep_k, base)
            ladder = live.gather(1, k_rows)

            def locate(bound: Tensor) -> Tensor:
                return torch.searchsorted(ladder, bound.contiguous())
        elif keep_k is not None:
            before = torch.nn.functional.pad(keep_k.cumsum(1), (1, 0))

            def locate(bound: Tensor) -> Tensor:
                return before.gather(1, bound)
        else:

            def locate(bound: Tensor) -> Tensor:
                return bound

        assert start is not None
        assert end is not None
        first, last = locate(start), locate(end)
        ends = [first, torch.maximum(first, last)]
        if globals_:
            count = torch.cat([torch.full((1, x.length), x.globals, device=device) for x in segments], 1).expand(p, -1)
            own = torch.cat([torch.arange(x.length, device=device) < x.globals for x in segments])
            head, tail = locate(origin), locate(origin + count)
            ends = [
                head,
                torch.where(own, ends[1], tail),
                torch.where(own, ends[1], ends[0]),
                ends[1],
            ]
        ranges = torch.stack(ends, -1)
        if q_rows is not None:
            ranges = ranges.gather(1, q_rows[..., None].expand(-1, -1, ranges.shape[-1]))
        if q_count is not None:
            dropped = torch.arange(s, device=device) >= q_count[:, None]
            ranges = ranges.masked_fill(dropped[..., None], 0)
        ranges = ranges.to(torch.int32)

    def small(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(torch.int32)

    if box is not None:
        box = Box(
            _permuted(box.q_attr, q_rows),
            _permuted(box.k_attr, k_rows),
            box.bounds,
            None if box.q_global is None else _permuted(box.q_global, q_rows),
            None if box.k_global is None else _permuted(box.k_global, k_rows),
        )
    return MaskPlan(
        s_q=s,
        s_k=s,
        groups=1,
        len_q=s,
        len_k=s,
        q_rows=small(q_rows),
        k_rows=small(k_rows),
        q_count=small(q_count),
        k_count=small(k_count),
        ranges=ranges,
        box=box,
    )


def _compacted(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept rows in order, then dropped rows in order; and how many are kept."""
    rank = keep.cumsum(1)
    count = keep.sum(1)
    position = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    place = torch.where(keep, rank - 1, count[:, None] + position - rank)
    return torch.empty_like(rank).scatter_(1, place, position), count


def _permuted(values: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return values.contiguous()
    index = rows if values.dim() == 2 else rows[:, None].expand(-1, values.shape[1], -1)
    return values.expand(rows.shape[0], *values.shape[1:]).gather(-1, index)


def _box(segments: list[Segment], parts: list[_Part], p: int, device: torch.device) -> Box | None:
    """What the intervals leave over. A segment without one of the relations writes 0 there, which satisfies it."""
    columns, places = box_columns([part.roles for part in parts])
    if not columns:
        return None
    rows = []
    for segment, part, used in zip(segments, parts, places, strict=True):
        values = torch.zeros((p, len(columns), segment.length), dtype=torch.int32, device=device)
        for relation, column in zip(part.roles.box, used, strict=True):
            values[:, column, segment.globals :] = relation.attribute.values(device)
        rows.append(values)
    attributes = torch.cat(rows, -1)
    flags = None
    if any(segment.globals for segment in segments):
        own = [torch.arange(segment.length, device=device) < segment.globals for segment in segments]
        flags = torch.cat(own)[None].expand(p, -1).to(torch.uint8)
    return Box(attributes, attributes, tuple(columns), flags, flags)
