"""Attributes: small integers per token, and relations on their differences. What every mask is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vkernels.masks.grid import Grid
from vkernels.masks.plan import INFINITY


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it: a copy out of pageable memory would."""
    if device.type == "cuda" and values.device.type == "cpu" and not torch.compiler.is_compiling():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class Axis:
    """Frame (0), row (1) or column (2) of the tokens of a grid."""

    grid: Grid
    axis: int

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    @property
    def size(self) -> int:
        return self.grid.shape[self.axis]

    @property
    def inner(self) -> int:
        """Tokens between neighbours along the axis."""
        _, h, w = self.grid.shape
        return (h * w, w, 1)[self.axis]

    @property
    def monotone(self) -> bool:
        return all(size <= 1 for size in self.grid.shape[: self.axis])

    def values(self, device: torch.device) -> Tensor:
        position = torch.arange(self.tokens, device=device)
        return (position // max(self.inner, 1) % max(self.size, 1))[None]

    def interval(self, lo: int, hi: int, device: torch.device) -> tuple[Tensor, Tensor]:
        value = torch.arange(self.tokens, device=device)[None] // max(self.inner, 1)
        return (value + lo) * self.inner, (value + (hi + 1)) * self.inner


@dataclass(frozen=True)
class Position:
    """The token's own number."""

    tokens: int
    monotone = True

    @property
    def size(self) -> int:
        return self.tokens

    def values(self, device: torch.device) -> Tensor:
        return torch.arange(self.tokens, device=device)[None]

    def interval(self, lo: int, hi: int, device: torch.device) -> tuple[Tensor, Tensor]:
        position = torch.arange(self.tokens, device=device)[None]
        return position + lo, position + (hi + 1)


@dataclass(frozen=True)
class Blocks:
    """Consecutive runs of tokens, numbered in order."""

    lengths: tuple[int, ...]
    monotone = True

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def size(self) -> int:
        return len(self.lengths)

    def values(self, device: torch.device) -> Tensor:
        lengths = upload(torch.tensor(self.lengths, dtype=torch.int64), device)
        number = torch.arange(self.size, device=device)
        return torch.repeat_interleave(number, lengths, output_size=self.tokens)[None]

    def interval(self, lo: int, hi: int, device: torch.device) -> tuple[Tensor, Tensor]:
        ends = upload(torch.tensor((0, *self.lengths), dtype=torch.int64), device).cumsum(0)
        value = self.values(device)
        return ends[(value + lo).clamp(0, self.size)], ends[(value + (hi + 1)).clamp(0, self.size)]


class Ids:
    """Blocks named by a tensor: a token's value is the position at which its block first appears. int32 [p, n]."""

    def __init__(self, keys: Tensor, monotone: bool):
        self.keys, self.monotone = keys, monotone
        self._content: bytes | None = None

    @classmethod
    def from_ids(cls, ids: Tensor) -> Ids:
        """`ids` [p, n]; a negative id is a block of its own."""
        p, n = ids.shape
        position = torch.arange(n, device=ids.device).expand(p, n)
        ids = ids.long()
        alone = ids < 0
        ordered, order = torch.sort(ids, dim=1, stable=True)
        begins = torch.ones_like(alone)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        run = position.masked_fill(~begins, 0).cummax(1).values if n else position
        first = torch.empty_like(order).scatter_(1, order, order.gather(1, run))
        keys = torch.where(alone, position, first).to(torch.int32)
        known = keys.device.type == "cpu"
        return cls(keys, known and bool((keys[:, 1:] >= keys[:, :-1]).all()))

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def size(self) -> int:
        return self.tokens

    def values(self, device: torch.device) -> Tensor:
        return upload(self.keys, device).long()

    def interval(self, lo: int, hi: int, device: torch.device) -> tuple[Tensor, Tensor]:
        keys = self.values(device).contiguous()
        return torch.searchsorted(keys, keys + lo), torch.searchsorted(keys, keys + hi, right=True)

    def _key(self) -> tuple[Any, ...]:
        if self._content is None:
            self._content = self.keys.cpu().contiguous().numpy().tobytes()
        return tuple(self.keys.shape), self._content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and (self is other or self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())


Attribute = Axis | Position | Blocks | Ids


@dataclass(frozen=True)
class Relation:
    """lo <= a_k - a_q <= hi. Every relation contains 0, so a token that is kept sees itself."""

    attribute: Attribute
    lo: int
    hi: int

    @property
    def same(self) -> bool:
        return self.lo == self.hi == 0

    @property
    def trivial(self) -> bool:
        span = self.attribute.size - 1
        return -self.lo >= span and self.hi >= span


@dataclass(frozen=True)
class Segment:
    """Tokens that may see each other: `globals` leading ones without restriction, then `tokens` under relations."""

    tokens: int
    relations: tuple[Relation, ...] = ()
    globals: int = 0

    @property
    def length(self) -> int:
        return self.globals + self.tokens


def within(lo: int | None, hi: int | None) -> tuple[int, int]:
    """Bounds with None and anything beyond INFINITY as INFINITY."""
    return (
        -INFINITY if lo is None else max(-lo, -INFINITY),
        INFINITY if hi is None else min(hi, INFINITY),
    )
