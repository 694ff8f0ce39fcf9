"""The definition: pair (j, j + r) of every head turns by the angle of its token."""

from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    inner = torch.promote_types(x.dtype, torch.float32)
    x0, x1 = x.to(inner).chunk(2, dim=-1)  # b s n r
    c, w = cos[:, :, None].to(inner), sin[:, :, None].to(inner)  # b s 1 r
    return torch.cat([x0 * c - x1 * w, x1 * c + x0 * w], dim=-1).to(x.dtype)
