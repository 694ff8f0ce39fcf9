"""Shares, differences and ratios with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def share(hits: np.ndarray) -> Estimate:
    """Right answers [seeds films]. Seeds and films are drawn again with replacement, because both are samples."""
    chance = np.random.default_rng(0)
    seeds, films = (chance.multinomial(n, [1 / n] * n, size=DRAWS) / n for n in hits.shape)
    return _estimate(float(hits.mean()), np.einsum("ds,sf,df->d", seeds, hits, films, optimize=True))


def difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """a - b, on the same films and seeds."""
    return share(a.astype(float) - b.astype(float))


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Median of a / b over alternating pairs of measurements."""
    pairs = np.array(a) / np.array(b)
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(DRAWS, len(pairs)))]
    return _estimate(float(np.median(pairs)), np.median(drawn, axis=1))


def more(of: Estimate) -> str:
    """Does the first have more?"""
    return "holds" if of.low > 0 else "does not hold" if of.high < 0 else "undecided: the interval contains zero"


def as_much(of: Estimate, margin: float) -> str:
    """Does the first have no less than the second, up to a margin?"""
    if of.low > -margin:
        return "holds"
    return "does not hold" if of.high < -margin else f"undecided: the interval reaches below -{margin:.0%}"


def at_most(of: Estimate, limit: float) -> str:
    """Is a ratio no larger than this?"""
    if of.high <= limit:
        return "holds"
    return "does not hold" if of.low > limit else f"undecided: the interval contains {limit:g}"


def at_least(of: Estimate, limit: float) -> str:
    """Is a ratio no smaller than this?"""
    if of.low >= limit:
        return "holds"
    return "does not hold" if of.high < limit else f"undecided: the interval contains {limit:g}"
