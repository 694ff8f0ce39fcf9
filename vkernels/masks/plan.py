"""MaskPlan: a mask as kernels eat it. O(N) memory, every tensor on one device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vkernels.check import require
from vkernels.named import Named
from vkernels.remember import Form

INFINITY = 2**30  # an unbounded side of a box relation


@dataclass(frozen=True, eq=False)
class Box:
    """A finer predicate on top of ranges: a pair is visible when every attribute difference lies within its bounds."""

    q_attr: Tensor  # int32 [p, A, len_q], processing order
    k_attr: Tensor  # int32 [p, A, len_k]
    bounds: tuple[tuple[int, int], ...]  # A inclusive pairs (lo, hi) on a_k - a_q; +-INFINITY where open
    q_global: Tensor | None = None  # uint8 [p, len_q]: pairs with either flag set skip the box
    k_global: Tensor | None = None  # uint8 [p, len_k]


@dataclass(frozen=True, eq=False)
class MaskPlan(Named):
    """Attention as `groups` independent problems of `len_q` x `len_k`, with the key intervals each query sees.

    Processing order: token i of group g is row ``g*q_stride[0] + i*q_stride[1]``, or ``q_rows[:, i]`` where a row map
    is given (then there is one group, live rows come first and dropped rows after them). Keys likewise.
    p is 1, or the batch when the mask differs from sample to sample.
    """

    s_q: int
    s_k: int
    groups: int
    len_q: int
    len_k: int
    q_stride: tuple[int, int] = (0, 1)
    k_stride: tuple[int, int] = (0, 1)
    q_rows: Tensor | None = None  # int32 [p, s_q]
    k_rows: Tensor | None = None  # int32 [p, s_k]
    q_count: Tensor | None = None  # int32 [p], live rows of q_rows; None: all
    k_count: Tensor | None = None  # int32 [p]
    ranges: Tensor | None = (
        None  # int32 [p, len_q, 2*R]: R half-open key intervals, disjoint, ascending; None: every live key
    )
    box: Box | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the tensors are; a plan without tensors serves every device and says cpu."""
        for tensor in (self.ranges, self.q_rows, self.k_rows):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")

    def arguments(self) -> tuple[Any, ...]:
        """The plan as attention's operators take it: layout, tensors, bounds. layout = groups, len_q, len_k, then the
        (group, token) strides of q and of k."""
        if (known := self._cache.get("arguments")) is not None:
            return known
        layout = [self.groups, self.len_q, self.len_k, *self.q_stride, *self.k_stride]
        box = self.box
        rest: tuple[Any, ...] = (None, None, [], None, None)
        if box is not None:
            rest = (box.q_attr, box.k_attr, [x for pair in box.bounds for x in pair], box.q_global, box.k_global)
        found = (layout, self.q_rows, self.k_rows, self.q_count, self.k_count, self.ranges, *rest)
        if not torch.compiler.is_compiling():
            self._cache["arguments"] = found
        return found

    def form(self, q: Tensor) -> Any:
        """What the plan looks like, for `remembered` decisions."""
        if torch.compiler.is_compiling():
            return None
        if (known := self._cache.get("form")) is None:
            known = self._cache["form"] = Form(self.s_q, self.s_k, *self.arguments())
        return known

    def tiles(self, block: int) -> Tensor | None:
        """int32 [p, ceil(len_q/block), R, 4]: min_start, max_start, min_end, max_end of each tile of `block` queries.

        Interval r of the tile lies inside ``[min_start, max_end)``; every query of the tile sees all of
        ``[max_start, min_end)`` (empty when max_start >= min_end), where no range test is needed. Empty intervals do
        not widen the outer bounds but do empty the core; dropped queries count for nothing. None when ranges is None.
        """
        _check_block("tiles", block)
        if self.ranges is None:
            return None
        if ("tiles", block) not in self._cache:
            self._cache["tiles", block] = _tile_bounds(self.ranges, self.q_count, self.len_k, block)
        return self._cache["tiles", block]

    def k_tiles(self, block: int) -> Tensor | None:
        """int32 [p, ceil(len_k/block), 2]: the first query, and one past the last, that sees any key of each key tile.

        The loop bounds of a backward pass over keys: no query outside them sees the tile by its ranges. (0, 0) where
        none does. None when ranges is None.
        """
        _check_block("k_tiles", block)
        if self.ranges is None:
            return None
        if ("k_tiles", block) not in self._cache:
            self._cache["k_tiles", block] = _key_tile_bounds(self.ranges, self.len_k, block)
        return self._cache["k_tiles", block]


def _check_block(method: str, block: int) -> None:
    require(isinstance(block, int) and block >= 1, f"MaskPlan.{method}", "block", "be an int of at least 1", block)


def _tile_bounds(ranges: Tensor, q_count: Tensor | None, len_k: int, block: int) -> Tensor:
    p, length = ranges.shape[:2]
    pairs = ranges.view(p, length, -1, 2)
    start, end = pairs[..., 0], pairs[..., 1]
    dead = torch.zeros((p, length, 1), dtype=torch.bool, device=ranges.device)
    if q_count is not None:
        dead = (torch.arange(length, device=ranges.device) >= q_count[:, None])[..., None]
    empty = (start >= end) & ~dead
    outside = empty | dead
    far, near = len_k, 0

    def reduce(values: Tensor, neutral: int, largest: bool) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, 0, 0, -length % block), value=neutral)
        tiles = padded.view(p, -(-length // block), block, values.shape[-1])
        return tiles.amax(2) if largest else tiles.amin(2)

    min_start = reduce(start.masked_fill(outside, far), far, largest=False)
    max_end = reduce(end.masked_fill(outside, near), near, largest=True)
    max_start = reduce(start.masked_fill(dead, near).masked_fill(empty, far), near, largest=True)
    min_end = reduce(end.masked_fill(dead, far), far, largest=False)
    nothing = min_start >= max_end
    bounds = torch.stack([min_start, max_start, min_end, max_end], -1)
    return bounds.masked_fill(nothing[..., None], 0).to(torch.int32)


def _key_tile_bounds(ranges: Tensor, len_k: int, block: int) -> Tensor:
    """Each interval covers a run of key tiles: written as two overlapping runs of 2^level tiles, then pushed down."""
    p, length = ranges.shape[:2]
    pairs = ranges.view(p, length, -1, 2).long()
    start, end = pairs[..., 0].flatten(1), pairs[..., 1].flatten(1)  # [p, length*R]
    tiles = -(-len_k // block)
    if tiles == 0 or length == 0:
        return torch.zeros((p, tiles, 2), dtype=torch.int32, device=ranges.device)
    first = torch.div(start, block, rounding_mode="floor")
    last = torch.div(end - 1, block, rounding_mode="floor")
    count = (last - first + 1).clamp_min(1)
    levels = tiles.bit_length()
    powers = 2 ** torch.arange(1, levels, device=ranges.device)
    level = (count[..., None] >= powers).sum(-1)
    query = torch.arange(length, device=ranges.device).repeat_interleave(pairs.shape[2]).expand(p, -1)
    spare = levels * tiles  # where empty intervals write
    empty = start >= end
    low = torch.full((p, spare + 1), length, dtype=torch.int64, device=ranges.device)
    high = torch.zeros_like(low)
    for run in (first, last - 2**level + 1):
        index = (level * tiles + run).masked_fill(empty, spare)
        low.scatter_reduce_(1, index, query, "amin")
        high.scatter_reduce_(1, index, query + 1, "amax")
    low, high = low[:, :spare].view(p, levels, tiles), high[:, :spare].view(p, levels, tiles)
    for top in range(levels - 1, 0, -1):
        half = 2 ** (top - 1)
        for shift in (0, half):
            room = max(tiles - shift, 0)
            low[:, top - 1, shift:] = torch.minimum(low[:, top - 1, shift:], low[:, top, :room])
            high[:, top - 1, shift:] = torch.maximum(high[:, top - 1, shift:], high[:, top, :room])
    bounds = torch.stack([low[:, 0], high[:, 0]], -1)
    return bounds.masked_fill((bounds[..., :1] >= bounds[..., 1:]), 0).to(torch.int32)
