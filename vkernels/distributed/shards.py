"""Who holds which tokens: dealt so that every rank has as many tokens, and as many visible pairs, as the others."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vkernels.check import require
from vkernels.distributed.parts import Flat, flatten
from vkernels.masks import MaskPlan, VideoMask
from vkernels.named import Named

TILE = 128  # tokens of a query tile: chunks much smaller than that leave tiles half empty
MOST_CHUNKS = 8  # per rank: more would balance better and split tiles

Mask = VideoMask | MaskPlan | int


def tokens_of(mask: Mask) -> int:
    """The tokens a mask speaks of; an int is so many tokens that all see each other."""
    if isinstance(mask, MaskPlan):
        require(mask.s_q == mask.s_k, "plan_shards", "mask", "have as many queries as keys", f"{mask.s_q} x {mask.s_k}")
        return mask.s_q
    return mask if isinstance(mask, int) else mask.tokens


@dataclass(frozen=True, eq=False)
class ShardPlan(Named):
    """`tokens[r]`: the token rows of rank r, ascending. Everything else follows from these and the mask."""

    flat: Flat
    tokens: tuple[Tensor, ...]  # int64, on the CPU

    @property
    def world(self) -> int:
        return len(self.tokens)

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """Visible pairs of each rank's queries, an upper bound where the mask has a finer predicate."""
        work = self.flat.work()
        return tuple(int(work[rows].sum()) for rows in self.tokens)

    @property
    def imbalance(self) -> float:
        """The busiest rank's visible pairs over the mean."""
        mean = sum(self.pairs) / self.world
        return max(self.pairs) / mean if mean else 1.0

    @cached_property
    def order(self) -> Tensor:
        """Token row of each row of the shards laid end to end."""
        return torch.cat(self.tokens)

    @cached_property
    def needs(self) -> tuple[tuple[Tensor, ...], ...]:
        """needs[r][j]: which rows of rank j's shard rank r's queries see; the others are never sent to r."""
        return tuple(
            tuple(self.flat.seen_keys(queries, keys).nonzero().flatten() for keys in self.tokens)
            for queries in self.tokens
        )

    @cached_property
    def digest(self) -> str:
        """Of the mask and the deal, equal in every process."""
        content = hashlib.sha256()
        for x in (*self.flat.tensors(), *self.tokens):
            content.update(repr(tuple(x.shape)).encode())
            content.update(x.contiguous().numpy().tobytes())
        return content.hexdigest()

    @cached_property
    def seats(self) -> dict[Any, Any]:
        """What each rank does, made when it is first asked for."""
        return {}

    def __str__(self) -> str:
        lines = [f"{'rank':>4} {'tokens':>8} {'visible pairs':>14} {'keys from others':>17}"]
        for r in range(self.world):
            foreign = sum(len(rows) for j, rows in enumerate(self.needs[r]) if j != r)
            lines.append(f"{r:>4} {len(self.tokens[r]):>8} {self.pairs[r]:>14,} {foreign:>17,}")
        return "\n".join([*lines, f"imbalance {self.imbalance:.3f}"])


@torch.inference_mode(False)  # a deal is remembered: what served an answer may serve a training step
def plan_shards(mask: Mask, world: int, *, chunk: int | None = None) -> ShardPlan:
    """Deal the tokens of a mask to `world` ranks.

    Chunks of neighbouring tokens go, heaviest first, to the rank with the least work that has room: for a causal mask
    that is the zigzag, for others whatever their visible pairs ask for; dropped tokens weigh nothing.

    Args:
        mask:  a VideoMask, a MaskPlan of as many queries as keys, or a number of tokens that all see each other
        world: ranks
        chunk: tokens dealt at once; None: as many chunks per rank as keep query tiles whole, at most 8
    Returns:
        a ShardPlan; print it for tokens, visible pairs and the imbalance
    Raises:
        ValueError, TypeError
    Example:
        >>> print(plan_shards(VideoMask.causal(8192), 4))
    """
    op = "plan_shards"
    good = isinstance(mask, (VideoMask, MaskPlan)) or (
        isinstance(mask, int) and not isinstance(mask, bool) and mask >= 0
    )
    require(good, op, "mask", "be a VideoMask, a MaskPlan or a number of tokens", repr(mask)[:80], TypeError)
    require(isinstance(world, int) and world >= 1, op, "world", "be at least 1", world)
    require(chunk is None or (isinstance(chunk, int) and chunk >= 1), op, "chunk", "be at least 1", chunk)
    s = tokens_of(mask)
    if chunk is None:
        per_rank = min(max(s // (world * TILE), 1), MOST_CHUNKS)
        count = world * per_rank
    else:
        count = -(-s // chunk)
        per_rank = -(-count // world)
    flat = flatten(mask, s)
    bounds = [i * s // count for i in range(count + 1)] if chunk is None else [*range(0, s, chunk), s]
    work = torch.nn.functional.pad(flat.work().cumsum(0), (1, 0))
    weights = [(int(work[b] - work[a]), a, b) for a, b in pairwise(bounds) if b > a]
    ranks = [(0, 0, r) for r in range(world)]  # work, chunks, rank
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for weight, a, b in sorted(weights, key=lambda chunk: (-chunk[0], chunk[1])):
        load, held, r = heapq.heappop(ranks)
        dealt[r].append((a, b))
        if held + 1 < per_rank:
            heapq.heappush(ranks, (load + weight, held + 1, r))
    empty = torch.zeros(0, dtype=torch.int64)
    tokens = tuple(torch.cat([empty, *(torch.arange(a, b) for a, b in sorted(chunks))]) for chunks in dealt)
    return ShardPlan(flat, tokens)
