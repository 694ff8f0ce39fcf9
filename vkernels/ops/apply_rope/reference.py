"""The definition: pair j of every head turns by the angle of its token, `freq[j] * pos[axis[j]]`."""

from __future__ import annotations

import torch

from vkernels.rope import RopeSpec


def angles(spec: RopeSpec, pos: torch.Tensor) -> torch.Tensor:
    """float64 radians [heads, b|1, s, r] of `pos` [axes, b|1, s]."""
    axis, _ = spec.tables(pos.device)
    freq = torch.tensor(spec.freq, dtype=torch.float64, device=pos.device)
    picked = pos.to(torch.float64)[axis.clamp(min=0).long()]  # heads r b s
    return torch.where(axis[:, None, None] < 0, 0.0, picked.permute(0, 2, 3, 1) * freq)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spec: RopeSpec, inverse: bool, scale: float
) -> torch.Tensor:
    """`x` [b, s, n, d] by tables [heads, b|1, s, r], or [1, b|1, s, 2, r]: each member of a pair by its own angle."""
    inner = torch.promote_types(x.dtype, torch.float32)
    group = x.shape[2] // cos.shape[0]
    if cos.dim() == 4:
        cos, sin = (t.unsqueeze(-2).expand(*t.shape[:-1], 2, -1) for t in (cos, sin))
    c, w = (t.to(inner).permute(1, 2, 0, 3, 4).repeat_interleave(group, 2) * scale for t in (cos, sin))  # b s n 2 r
    if inverse:
        w = -w
    c0, c1, w0, w1 = *c.unbind(-2), *w.unbind(-2)
    head, turned, tail = x.to(inner).split(
        [spec.offset, spec.rotary_dim, x.shape[-1] - spec.offset - spec.rotary_dim], -1
    )
    if spec.layout == "pair":
        x0, x1 = turned.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([x0 * c0 - x1 * w0, x1 * c1 + x0 * w1], -1).flatten(-2)
    else:
        x0, x1 = turned.unflatten(-1, (spec.blocks, 2, -1)).unbind(-2)
        c0, c1, w0, w1 = (t.unflatten(-1, (spec.blocks, -1)) for t in (c0, c1, w0, w1))
        turned = torch.stack([x0 * c0 - x1 * w0, x1 * c1 + x0 * w1], -2).flatten(-3)
    return torch.cat([head, turned, tail], -1).to(x.dtype)


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    spec: RopeSpec,
    pos: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    inverse: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if cos is None or sin is None:
        assert pos is not None
        angle = angles(spec, pos)
        c, w = angle.cos(), angle.sin()
    else:
        c, w = cos[None], sin[None]
    turned = [None if x is None else rotate(x, c, w, spec, inverse, scale) for x in (q, k)]
    return turned[0], turned[1]  # type: ignore[return-value]
