"""A mask plan over any subset of its queries and any subset of its keys.

In processing order every query sees at most three intervals of keys. Keys kept in that order keep them intervals, so
the plan of a shard against a shard is a binary search, whatever the mask was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vkernels.masks import MaskPlan, VideoMask
from vkernels.masks.plan import Box


@dataclass(frozen=True, eq=False)
class Flat:
    """A mask as one group: the place of every token in processing order, and the places each query sees. On the CPU.

    p is 1, or the batch.
    """

    q_place: Tensor  # int64 [p, s]: place of each token among the queries
    k_place: Tensor  # int64 [p, s]
    ranges: Tensor  # int64 [p, s, 2 R], by place
    q_count: Tensor  # int64 [p]: live queries
    box: Box | None

    @property
    def tokens(self) -> int:
        return self.q_place.shape[1]

    @property
    def samples(self) -> int:
        return max(self.q_place.shape[0], self.ranges.shape[0])

    def tensors(self) -> list[Tensor]:
        """Everything that says who sees whom."""
        box = self.box
        parts = [] if box is None else [box.q_attr, box.k_attr, torch.tensor(box.bounds), box.q_global, box.k_global]
        return [x for x in (self.q_place, self.k_place, self.ranges, self.q_count, *parts) if x is not None]

    def seen_by_token(self) -> Tensor:
        """Key intervals [p, s, R, 2] of each token's query; those of dropped queries are empty."""
        p = max(self.q_place.shape[0], self.ranges.shape[0])
        pairs = _take(self.ranges.expand(p, -1, -1), self.q_place.expand(p, -1)).unflatten(-1, (-1, 2))
        dead = self.q_place >= self.q_count[:, None]
        return pairs.masked_fill(dead[..., None, None], 0)

    @cached_property
    def _work(self) -> Tensor:
        pairs = self.seen_by_token()
        return (pairs[..., 1] - pairs[..., 0]).clamp_min(0).sum((0, 2))

    def work(self) -> Tensor:
        """Keys each token's query sees, summed over samples: int64 [s]."""
        return self._work

    def seen_keys(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [keys]: whether any of the queries, in any sample, sees the key (by its intervals)."""
        pairs = self.seen_by_token()[:, queries].flatten(1, 2)  # p (queries R) 2
        p, s = pairs.shape[0], self.tokens
        open_ends = torch.zeros((p, s + 1), dtype=torch.int64)
        full = (pairs[..., 0] < pairs[..., 1]).long()
        open_ends.scatter_add_(1, pairs[..., 0].clamp(0, s), full)
        open_ends.scatter_add_(1, pairs[..., 1].clamp(0, s), -full)
        seen = open_ends.cumsum(1)[:, :s] > 0  # by place
        return seen.gather(1, self.k_place[:, keys].expand(p, -1)).any(0)

    def part(self, queries: Tensor, keys: Tensor) -> MaskPlan:
        """The plan of those queries against those keys, rows counted within the two subsets; on the CPU."""
        q_places, q_rows = self.q_place[:, queries].sort(1)
        k_places, k_rows = self.k_place[:, keys].sort(1)
        p = max(x.shape[0] for x in (q_places, k_places, self.ranges))
        mine = _take(self.ranges.expand(p, -1, -1), q_places.expand(p, -1))
        ranges = torch.searchsorted(k_places.expand(p, -1).contiguous(), mine.flatten(1)).view_as(mine)
        q_live = (q_places < self.q_count[:, None]).sum(1)
        return MaskPlan(
            s_q=len(queries),
            s_k=len(keys),
            groups=1,
            len_q=len(queries),
            len_k=len(keys),
            q_rows=_rows(q_rows, q_live),
            k_rows=_rows(k_rows, None),
            q_count=q_live.to(torch.int32) if bool((q_live < len(queries)).any()) else None,
            ranges=ranges.to(torch.int32),
            box=self._box(q_places, k_places),
        )

    def _box(self, q_places: Tensor, k_places: Tensor) -> Box | None:
        if self.box is None:
            return None
        box = self.box

        def pick(values: Tensor | None, places: Tensor) -> Any:
            if values is None:
                return None
            p = max(len(values), len(places))
            values, places = values.expand(p, *values.shape[1:]), places.expand(p, -1)
            if values.dim() == 3:
                places = places[:, None].expand(-1, values.shape[1], -1)
            return values.gather(-1, places).contiguous()

        return Box(
            q_attr=pick(box.q_attr, q_places),
            k_attr=pick(box.k_attr, k_places),
            bounds=box.bounds,
            q_global=pick(box.q_global, q_places),
            k_global=pick(box.k_global, k_places),
        )


def _take(values: Tensor, places: Tensor) -> Tensor:
    """values [p, s, x] at places [p, q] -> [p, q, x]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


def _rows(rows: Tensor, live: Tensor | None) -> Tensor | None:
    """A row map, or None where it is the identity and nothing is dropped."""
    dropped = live is not None and bool((live < rows.shape[1]).any())
    plain = not dropped and bool((rows == torch.arange(rows.shape[1])).all())
    return None if plain else rows.to(torch.int32).contiguous()


def flatten(mask: VideoMask | MaskPlan | int, s: int) -> Flat:
    """The flat form of a mask over s tokens."""
    if isinstance(mask, int):
        place = torch.arange(s)[None]
        everything = torch.tensor([0, s]).expand(1, s, 2)
        return Flat(place, place, everything, torch.tensor([s]), None)
    plan = to(mask.plan("cpu") if isinstance(mask, VideoMask) else mask, "cpu")
    q_rows = _order(plan.q_rows, plan.groups, plan.len_q, plan.q_stride)
    k_rows = _order(plan.k_rows, plan.groups, plan.len_k, plan.k_stride)
    q_count = torch.tensor([s]) if plan.q_count is None else plan.q_count.long()
    if plan.ranges is None:
        end = torch.tensor([plan.len_k]) if plan.k_count is None else plan.k_count.long()
        ranges = torch.stack([torch.zeros_like(end), end], -1)[:, None].expand(-1, plan.len_q, 2)
    else:
        ranges = plan.ranges.long()
        if plan.k_count is not None:
            ranges = torch.minimum(ranges, plan.k_count.long()[:, None, None])
    shift = (torch.arange(plan.groups) * plan.len_k)[None, :, None, None]
    ranges = (ranges[:, None] + shift).flatten(1, 2)  # the groups' keys lie one after the other
    return Flat(_inverse(q_rows), _inverse(k_rows), ranges, q_count, _repeated(plan.box, plan.groups))


def _order(rows: Tensor | None, groups: int, length: int, stride: tuple[int, int]) -> Tensor:
    """Token row of each place: [p, s]."""
    if rows is not None:
        return rows.long()
    group, token = torch.arange(groups)[:, None], torch.arange(length)
    return (group * stride[0] + token * stride[1]).flatten()[None]


def _inverse(order: Tensor) -> Tensor:
    place = torch.empty_like(order)
    return place.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def _repeated(box: Box | None, groups: int) -> Box | None:
    if box is None or groups == 1:
        return box

    def wide(x: Tensor | None) -> Any:
        return None if x is None else x.repeat(*[1] * (x.dim() - 1), groups)

    return Box(wide(box.q_attr), wide(box.k_attr), box.bounds, wide(box.q_global), wide(box.k_global))


def to(plan: MaskPlan, device: torch.device | str) -> MaskPlan:
    """The plan with its tensors on another device."""
    if plan.device == torch.device(device):
        return plan

    def move(x: Tensor | None) -> Any:
        return None if x is None else x.to(device)

    box = plan.box
    if box is not None:
        box = Box(move(box.q_attr), move(box.k_attr), box.bounds, move(box.q_global), move(box.k_global))
    return MaskPlan(
        s_q=plan.s_q,
        s_k=plan.s_k,
        groups=plan.groups,
        len_q=plan.len_q,
        len_k=plan.len_k,
        q_stride=plan.q_stride,
        k_stride=plan.k_stride,
        q_rows=move(plan.q_rows),
        k_rows=move(plan.k_rows),
        q_count=move(plan.q_count),
        k_count=move(plan.k_count),
        ranges=move(plan.ranges),
        box=box,
    )
