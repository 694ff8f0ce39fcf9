"""Grids whose frequencies restart on every axis, by the model that uses them: sizes per axis, base and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """`sizes(d)` are rotated elements per axis of positions (t, h, w), or (h, w) where there are two; a head's rest is
    copied. `order(pairs)` says which pair of the plain grid stands where, None: as it is."""

    sizes: Callable[[int], tuple[int, ...]]
    base: float = 10000.0
    layout: str = "half"
    order: Callable[[int], list[int]] | None = None


def _halves(d: int) -> tuple[int, ...]:
    return d // 2, d // 2


def _wan(d: int) -> tuple[int, ...]:
    pairs = d // 2
    return 2 * (pairs - 2 * (pairs // 3)), 2 * (pairs // 3), 2 * (pairs // 3)


def _columns_first(pairs: int) -> list[int]:
    return [*range(pairs // 2, pairs), *range(pairs // 2)]


def _alternate(pairs: int) -> list[int]:
    return [j for i in range(pairs // 2) for j in (pairs // 2 + i, i)]


RECIPES = {
    "vit2d": Recipe(_halves),
    "ggml_vision": Recipe(_halves),
    "gemma4_vision": Recipe(_halves, layout="axial"),
    "kimi_vision": Recipe(_halves, layout="pair", order=_alternate),
    "llama4_vision": Recipe(_halves, layout="pair", order=_columns_first),
    "minimax_vision": Recipe(lambda d: (2 * (d // 3 // 2),) * 3),
    "wan": Recipe(_wan, layout="pair"),
    "hunyuan_video": Recipe(lambda d: (d // 8, d // 16 * 7, d // 16 * 7), base=256.0, layout="pair"),
    "cogvideox": Recipe(lambda d: (d // 4, d // 8 * 3, d // 8 * 3), layout="pair"),
}
