"""Shares, differences and ratios with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def _bootstrap(seeds: int, films: int, value: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
    """Of a function of (seeds, films): both are drawn again with replacement, because both are samples."""
    chance = np.random.default_rng(0)
    drawn = [value(chance.integers(seeds, size=seeds), chance.integers(films, size=films)) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value(np.arange(seeds), np.arange(films)), float(low), float(high))


def share(hits: np.ndarray) -> Estimate:
    """Right answers [seeds films]."""
    return _bootstrap(hits.shape[0], hits.shape[1], lambda s, f: float(hits[np.ix_(s, f)].mean()))


def difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """a - b, on the same films and seeds."""
    apart = a.astype(float) - b.astype(float)
    return _bootstrap(apart.shape[0], apart.shape[1], lambda s, f: float(apart[np.ix_(s, f)].mean()))


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Median of a / b over alternating pairs of measurements."""
    pairs = np.array(a) / np.array(b)
    return _bootstrap(1, len(pairs), lambda s, f: float(np.median(pairs[f])))


def more(of: Estimate) -> str:
    """Does the first have more?"""
    return "holds" if of.low > 0 else "does not hold" if of.high < 0 else "undecided: the interval contains zero"


def as_much(of: Estimate, margin: float) -> str:
    """Does the first have no less than the second, up to a margin?"""
    if of.low > -margin:
        return "holds"
    return "does not hold" if of.high < -margin else f"undecided: the interval reaches below -{margin:.0%}"
