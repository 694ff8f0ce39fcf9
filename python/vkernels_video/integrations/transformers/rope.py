"""Rotary positions: the functions modeling files call by name, on `vkernels.apply_rope`.

A modeling file's own function stays where it is; the attention modules of one model run the same forward with the name
meaning ours. Before that the two are compared on a small random input: a file whose function of that name turns
otherwise (neighbouring pairs, part of the head) is left alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.patches import reads, with_names
from vkernels_video.integrations.transformers.seams import Seam

Rotate = Callable[..., tuple[Tensor, Tensor]]


@lru_cache(maxsize=64)
def halves(pairs: int) -> vk.RopeSpec:
    """A spec that takes its angles from the caller's tables."""
    return vk.RopeSpec((0.0,) * pairs)


def text_rope(spec: vk.RopeSpec, seam: Seam | None = None) -> Rotate:
    """`apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)`: q, k [b, n, s, d] or [b, s, n, d], tables [b, s, d]."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if seam is not None:
            seam.called()
        if unsqueeze_dim == 2:
            return vk.apply_rope(q, k, spec, angle=(cos, sin))
        q, k = vk.apply_rope(q.transpose(1, 2), k.transpose(1, 2), spec, angle=(cos, sin))
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


def vision_rope(spec: vk.RopeSpec, seam: Seam | None = None) -> Rotate:
    """`apply_rotary_pos_emb_vision(q, k, cos, sin)`: q, k [s, n, d] or [b, s, n, d], tables [s, d]."""

    def apply_rotary_pos_emb_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if seam is not None:
            seam.called()
        if q.dim() == 4:
            return vk.apply_rope(q, k, spec, angle=(cos, sin))
        q, k = vk.apply_rope(q[None], k[None], spec, angle=(cos, sin))
        return q[0], k[0]

    return apply_rotary_pos_emb_vision


FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[..., Rotate]]] = {
    "apply_rotary_pos_emb": (("q", "k", "cos", "sin"), text_rope),
    "apply_rotary_pos_emb_vision": (("q", "k", "cos", "sin"), vision_rope),
}


def rope_name(forward: Any) -> str | None:
    """Which of the known functions a forward calls by name."""
    return next((name for name in FUNCTIONS if reads(forward, name)), None)


def why_not(forward: Any, name: str) -> str | None:
    """None where the function `forward` knows as `name` does what ours does, else a sentence."""
    stock = forward.__globals__[name]
    expected, make = FUNCTIONS[name]
    if isinstance(stock, types.FunctionType) and not host.starts_with(stock, expected):
        return f"{name} takes ({', '.join(host.parameters(stock))}) where ({', '.join(expected)}, ...) is expected"
    return None if _agree(stock, make(halves(4)), vision=name.endswith("vision")) else f"{name} is another rotation"


def _agree(stock: Rotate, ours: Rotate, vision: bool) -> bool:
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, n, 8, generator=source) for n in (2, 1))
    angle = torch.randn(3, 4, generator=source)
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))
    if not vision:
        q, k, cos, sin = q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    try:
        with torch.no_grad():
            pairs = list(zip(stock(q, k, cos, sin), ours(q, k, cos, sin), strict=True))
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def rotating(forward: Any, name: str, pairs: int, seam: Seam) -> types.FunctionType:
    """`forward` with the rope of `name` ours, heads of 2 * pairs."""
    return with_names(forward, **{name: FUNCTIONS[name][1](halves(pairs), seam)})
