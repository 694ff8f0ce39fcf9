"""The definition: bias, then RMS norm and rotation in the order asked for, each as one would write it."""

from __future__ import annotations

import torch

from vkernels.ops.apply_rope.reference import angles, rotate
from vkernels.rope import RopeSpec


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, all_heads: bool) -> torch.Tensor:
    """`x` [b, s, n, d], `weight` [d], or [n * d] where one norm spans all heads."""
    y = x.flatten(2) if all_heads else x
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    return y.view_as(x)


def qkv_prologue(
    qkv: torch.Tensor,
    heads: tuple[int, int, int],
    bias: torch.Tensor | None,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    spec: RopeSpec | None,
    pos: torch.Tensor | None,
    eps: float,
    post: bool,
    all_heads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, m, d = heads
    x = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    if bias is not None:
        x = x + bias
    q, k, v = x.unflatten(-1, (n + 2 * m, d)).split([n, m, m], dim=2)
    turned = []
    for y, weight in ((q, norms[0]), (k, norms[1])):
        if weight is not None and not post:
            y = rms_norm(y, weight, eps, all_heads)
        if spec is not None and pos is not None:
            angle = angles(spec, pos)
            y = rotate(y, angle.cos(), angle.sin(), spec, False, spec.scale)
        if weight is not None and post:
            y = rms_norm(y, weight, eps, all_heads)
        turned.append(y.to(qkv.dtype))
    return turned[0], turned[1], v.to(qkv.dtype)
