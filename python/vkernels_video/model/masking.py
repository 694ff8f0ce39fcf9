"""Which video tokens a training step keeps. The same seed gives the same tokens on every device.

Every sample of a batch keeps equally many, so that what is kept is a dense batch; indices are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkernels.check import require

LAYOUTS = ("tube", "ref")


def _random_keep(b: int, n: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of n, drawn uniformly for each of b samples, sorted: int64 [b count]."""
    order = torch.rand(b, n, generator=generator, dtype=torch.float64).argsort(dim=1)
    return order[:, :count].sort(dim=1).values


def tube_keep(
    b: int,
    t: int,
    l: int,  # noqa: E741
    ratio: float,
    *,
    layout: str = "tube",
    generator: torch.Generator | None = None,
) -> Tensor:
    """BT-Adapter's mask: the tokens left after dropping int(ratio l) patches, the same ones in all frames of a sample.

    Returns int64 [b (l - int(ratio l)) t], indices into patch-major tokens (patch t + frame).
    layout="tube" is what the paper describes. layout="ref" repeats what its code does: the mask is tiled frame by frame
    but read patch by patch, so that nothing in it is a tube; with it published runs can be reproduced.
    Source: BT-Adapter, arXiv:2309.15785.
    """
    require(0.0 <= ratio < 1.0, "tube_keep", "ratio", "lie in [0, 1)", ratio)
    require(layout in LAYOUTS, "tube_keep", "layout", f"be one of {', '.join(LAYOUTS)}", repr(layout))
    patches = _random_keep(b, l, l - int(ratio * l), generator)
    if layout == "tube":
        return (patches[:, :, None] * t + torch.arange(t)).flatten(1)
    return (torch.arange(t)[:, None] * l + patches[:, None, :]).flatten(1)


def dynamic_rate(
    generator: torch.Generator | None = None,
    *,
    low: float = 0.1,
    high: float = 0.7,
    mean: float = 0.5,
    std: float = 0.1,
) -> float:
    """ST-LLM's share of dropped tokens, one per batch: normal, clipped. Its paper clips at 0.3, its code at 0.1."""
    drawn = mean + std * float(torch.randn((), generator=generator, dtype=torch.float64))
    return min(max(drawn, low), high)


def random_keep(b: int, n: int, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """ST-LLM's mask: int64 [b n - int(rate n)], drawn for every sample without regard to frames."""
    require(0.0 <= rate < 1.0, "random_keep", "rate", "lie in [0, 1)", rate)
    return _random_keep(b, n, n - int(rate * n), generator)
