"""Where a model's tokens are: all in this process, or dealt to the ranks of a torch.distributed group.

Encoders and decoder put the same questions to a `Place`, whether it is one process or, as `Ranks`, several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

import vkernels as vk
from vkernels import distributed as vd
from vkernels.distributed.exchange import group_of, size_and_rank
from vkernels.distributed.parts import flatten
from vkernels.distributed.tokens import shards_of
from vkernels.rearrangement import gather

OP = "VideoLLM"


class Place:
    """One process, which has every token; a deal is the mask itself."""

    shared = False  # with other processes

    def each(self, run: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
        """`run` on what stands along a dimension and does not see each other: clips, frames."""
        return run(x)

    def deal(self, mask: vk.VideoMask) -> Any:
        """Who has which tokens of sequences that lie one after the other."""
        return mask

    def take(self, x: Tensor, deal: Any, dim: int) -> Tensor:
        """What this process has of x, which is whole on every one."""
        return x

    def rows(self, h: Tensor, rows: Tensor, deal: Any) -> Tensor:
        """Rows [k c], numbered over the whole, of states of which this process has h [1 own c]."""
        out = vk.rearrange(h, gather("rows", rows.cpu(), (h.shape[1],)))
        assert isinstance(out, Tensor)
        return out[0]

    def room(self, deal: Any, lengths: Sequence[int], tokens: int) -> int:
        """Tokens that a cache must hold for prompts of these lengths and `tokens` more."""
        return max(lengths) + tokens

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: vk.KVCache | None, deal: Any, lengths: Sequence[int]
    ) -> Tensor:
        """Attention of the sequences, of these lengths; keys and values stay in the cache, where there is one."""
        if cache is not None:
            remember(cache, k, v, list(lengths))
        return _tensor(vk.attention(q, k, v, mask=deal))

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: vk.KVCache, positions: Sequence[int]) -> Tensor:
        """Attention of one more token of every sequence, which the cache takes in."""
        return _tensor(vk.decode_attention(q, cache.append(k, v)))


class Ranks(Place):
    """The ranks of a group deal the tokens out among them by the mask.

    Pixels, text and weights are the same on every rank, and so are logits and losses. The gradient of a loss is the
    mean over the ranks, which DDP and FSDP make. Every rank runs the same operations in the same order, whatever it
    holds: none may wait for one that has nothing to do.
    """

    shared = True

    def __init__(self, mesh: Any):
        self.group = group_of(mesh, OP)
        self.world, self.me = size_and_rank(self.group)

    def __repr__(self) -> str:
        return f"{self.world} ranks"

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def each(self, run: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
        shards = shards_of(x.shape[dim], self.world, OP)
        mine = shards.tokens[self.me].to(x.device)
        # A rank that gets nothing runs the first and keeps none of it.
        out = run(x.index_select(dim, mine if len(mine) else mine.new_zeros(1))).narrow(dim, 0, len(mine))
        return vd.gather_tokens(out, shards, self.group, dim=dim)

    def deal(self, mask: vk.VideoMask) -> vd.ShardPlan:
        return shards_of(mask, self.world, OP)

    def take(self, x: Tensor, deal: vd.ShardPlan, dim: int) -> Tensor:
        return x.index_select(dim, deal.tokens[self.me].to(x.device))

    def rows(self, h: Tensor, rows: Tensor, deal: vd.ShardPlan) -> Tensor:
        place = deal.order.argsort()[rows.cpu()]  # in the shards laid end to end
        starts = [0, *accumulate(map(len, deal.tokens))]
        found = tuple(((place >= a) & (place < b)).nonzero().flatten() for a, b in pairwise(starts))
        own = place[found[self.me]] - starts[self.me]
        parts = vd.ShardPlan(flatten(len(rows), len(rows)), found)
        return vd.gather_tokens(h[0].index_select(0, own.to(h.device)), parts, self.group, dim=0)

    def room(self, deal: vd.ShardPlan, lengths: Sequence[int], tokens: int) -> int:
        return max(self._own(deal, lengths)) + -(-tokens // self.world)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: vk.KVCache | None, deal: vd.ShardPlan, lengths: Sequence[int]
    ) -> Tensor:
        if cache is not None:
            remember(cache, k, v, self._own(deal, lengths))
        return _tensor(vd.attention(q, k, v, deal, self.group))

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: vk.KVCache, positions: Sequence[int]) -> Tensor:
        """The token of position p goes to rank p modulo the ranks."""
        mine = [int(position % self.world == self.me) for position in positions]
        if any(mine):
            cache.append(k, v, count=mine)
        return _tensor(vd.decode_attention(q, cache, self.group))

    def _own(self, deal: vd.ShardPlan, lengths: Sequence[int]) -> list[int]:
        """How many tokens of each sequence are here."""
        ends = torch.tensor([0, *accumulate(lengths)])
        return torch.searchsorted(deal.tokens[self.me], ends).diff().tolist()


def remember(cache: vk.KVCache, k: Tensor, v: Tensor, lengths: list[int]) -> None:
    """Prompts [1 total m d], one after the other, into the cache; each as often as the cache has rows for it."""
    if len(lengths) > 1:
        k, v = (nn.utils.rnn.pad_sequence(x[0].split(lengths), batch_first=True) for x in (k, v))
    copies = cache.b // len(lengths)
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=0), v.repeat_interleave(copies, dim=0)
    cache.append(k, v, count=[length for length in lengths for _ in range(copies)])


def _tensor(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(out, Tensor)
    return out
