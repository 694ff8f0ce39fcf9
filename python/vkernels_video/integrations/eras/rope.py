"""Rotary positions of those years: the same rotation, handed tables of all positions and the positions to look up."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers import rope as ropes
from vkernels_video.integrations.transformers.seams import Seam

NAME = "apply_rotary_pos_emb"


def looks_up(stock: Callable[..., Any]) -> bool:
    """Whether the function takes tables of all positions and must be told which: (q, k, cos, sin, position_ids)."""
    place = inspect.signature(stock).parameters.get("position_ids")
    return place is not None and place.default is inspect.Parameter.empty


def lookup_rope(spec: vk.RopeSpec, seam: Seam | None = None) -> ropes.Rotate:
    """`apply_rotary_pos_emb(q, k, cos, sin, position_ids)`: tables (1 1 s d) or (s d), positions (b|1 s)."""
    turn = ropes.text_rope(spec, seam)

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, unsqueeze_dim: int = 1
    ) -> Any:
        cos, sin = (table.view(-1, table.shape[-1])[position_ids] for table in (cos, sin))
        return turn(q, k, cos, sin, unsqueeze_dim)

    return apply_rotary_pos_emb


def make(stock: Callable[..., Any], pairs: int, seam: Seam) -> ropes.Rotate:
    return (lookup_rope if looks_up(stock) else ropes.text_rope)(ropes.halves(pairs), seam)


def why_not(forward: Any) -> str | None:
    """None where the function `forward` knows by that name does what ours does, else a sentence."""
    stock = forward.__globals__[NAME]
    if not looks_up(stock):
        return ropes.why_not(forward, NAME)
    expected = ("q", "k", "cos", "sin", "position_ids")
    if not host.starts_with(stock, expected):
        return f"{NAME} takes ({', '.join(host.parameters(stock))}) where ({', '.join(expected)}) is expected"
    return None if _agree(stock, lookup_rope(ropes.halves(4))) else f"{NAME} is another rotation"


@torch.no_grad()
def _agree(stock: ropes.Rotate, ours: ropes.Rotate) -> bool:
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 3, 8, generator=source) for n in (2, 1))
    angle = torch.randn(5, 4, generator=source).repeat(1, 2)
    for shape in ((1, 1, 5, 8), (5, 8)):  # to 4.35, and after
        given = (q, k, angle.cos().view(shape), angle.sin().view(shape), torch.tensor([[4, 0, 2]]))
        try:
            pairs = list(zip(stock(*given), ours(*given), strict=True))
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue
        return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    return False
