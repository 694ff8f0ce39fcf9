"""Masks as the peers state them - sequence lengths, a band along a diagonal - as the key interval each query sees.

All of it is O(tokens), on the tensors' device, without waiting for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vkernels.check import require
from vkernels.masks import MaskPlan

NO_LIMIT = -1


class Band(NamedTuple):
    """Keys within `left` before and `right` after the query's own place; NO_LIMIT where a side is open.

    The query's place among its sequence's keys counts from the first key (top-left) or so that the last query stands
    at the last key (bottom-right).
    """

    left: int = NO_LIMIT
    right: int = NO_LIMIT
    bottom_right: bool = True

    @property
    def everything(self) -> bool:
        return self.left == NO_LIMIT and self.right == NO_LIMIT


def visible(query: Tensor, len_q: Tensor | int, len_k: Tensor | int, band: Band) -> tuple[Tensor, Tensor]:
    """Half-open interval [low, high) of a sequence's keys that its query number `query` sees; low <= high."""
    place = query + (len_k - len_q) if band.bottom_right else query
    low = torch.zeros_like(place) if band.left == NO_LIMIT else (place - band.left).clamp_min(0)
    high = torch.zeros_like(place) + len_k
    if band.right != NO_LIMIT:
        high = torch.minimum(high, place + band.right + 1)
    return torch.minimum(low, high.clamp_min(0)), high.clamp_min(0)


def plan(low: Tensor, high: Tensor, s_k: int) -> MaskPlan:
    """The mask plan of queries [p, s_q] that see keys [low, high) of the s_k of their sample."""
    s_q = low.shape[1]
    ranges = torch.stack([low, high], -1).to(torch.int32)
    return MaskPlan(s_q=s_q, s_k=s_k, groups=1, len_q=s_q, len_k=s_k, ranges=ranges)


def uniform(s_q: int, s_k: int, band: Band, device: torch.device) -> MaskPlan | None:
    """One band for every sample of a padded batch; None where everything is seen."""
    if band.everything:
        return None
    return (_uniform if torch.compiler.is_compiling() else _kept)(s_q, s_k, band, device)


def _uniform(s_q: int, s_k: int, band: Band, device: torch.device) -> MaskPlan:
    query = torch.arange(s_q, device=device)[None]
    return plan(*visible(query, s_q, s_k, band), s_k)


_kept = lru_cache(maxsize=64)(_uniform)


def in_sequences(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each of `tokens` rows of sequences laid end to end: its number, and its sequence's (the last one's after it)."""
    row = torch.arange(tokens, device=starts.device)
    sequence = torch.searchsorted(starts[1:].contiguous(), row, right=True)
    return row, sequence.clamp_max(len(starts) - 2)


def packed(start_q: Tensor, start_k: Tensor, len_k: Tensor, s_q: int, s_k: int, band: Band) -> MaskPlan:
    """Sequences end to end: queries from start_q[i] to start_q[i + 1], keys `len_k[i]` of them from start_k[i] on."""
    query, sequence = in_sequences(start_q, s_q)
    first, last = start_q[:-1].long()[sequence], start_q[1:].long()[sequence]
    low, high = visible(query - first, last - first, len_k.long()[sequence], band)
    outside = query >= start_q[-1]  # rows no sequence owns see nothing
    begin = start_k.long()[sequence]
    high = torch.where(outside, low, high)
    return plan((begin + low)[None], (begin + high)[None], s_k)


def by_length(s_q: int, first: Tensor | int, length: Tensor, s_k: int, band: Band) -> MaskPlan:
    """A padded batch whose sample i holds keys `first[i]` to `length[i]` of s_k; the last query stands at the last."""
    query = torch.arange(s_q, device=length.device)[None]
    length = length.long()[:, None]
    low, high = visible(query, s_q, length, band)
    if isinstance(first, Tensor):
        first = first.long()[:, None]
    low = low.clamp_min(first)
    return plan(low, torch.maximum(high, low), s_k)


MOST_RUNS = 3  # key intervals a kernel follows per query


def runs(seen: Tensor, op: str) -> MaskPlan:
    """The plan of a dense mask [p, s_q, s_k] whose rows show at most MOST_RUNS runs of keys. Waits for the device."""
    p, s_q, s_k = seen.shape
    edge = torch.nn.functional.pad(seen.to(torch.int8), (1, 1)).diff(dim=-1)  # p s_q s_k+1: 1 opens a run, -1 ends it
    opens, ends = edge == 1, edge == -1
    most = int(opens.sum(-1).max()) if opens.numel() else 0
    rule = f"show each query at most {MOST_RUNS} runs of keys (a VideoMask has no such limit)"
    require(most <= MOST_RUNS, op, "attn_mask", rule, most)
    ranges = torch.zeros((p, s_q, max(most, 1), 2), dtype=torch.int32, device=seen.device)
    for side, marks in enumerate((opens, ends)):
        sample, query, key = marks.nonzero(as_tuple=True)
        number = marks.cumsum(-1)[sample, query, key] - 1
        ranges[sample, query, number, side] = key.to(torch.int32)
    # a row with fewer runs repeats the end of its last one, so that intervals ascend
    last = ranges[..., 1].cummax(-1).values
    empty = ranges[..., 0] >= ranges[..., 1]
    ranges = torch.where(empty[..., None], last[..., None], ranges)
    return MaskPlan(s_q=s_q, s_k=s_k, groups=1, len_q=s_q, len_k=s_k, ranges=ranges.flatten(2))
