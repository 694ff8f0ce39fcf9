"""divided_attention against what TimeSformer, LanguageBind and BT-Adapter write: permute or repeat, SDPA, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import vkernels as vk
from vkernels.bench.measure import Bench
from vkernels.spec import Cost

N = 16


def _qkv(b: int, s: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, s, N, d, generator=generator).to(dtype) for _ in range(3)]


def _cost(q: torch.Tensor, pairs: float, b: int) -> Cost:
    return Cost(flop=4.0 * b * pairs * N * q.shape[-1], bytes=4.0 * q.numel() * q.element_size())


def _temporal(dtype: torch.dtype, b: int, t: int, d: int, model: str, target: float) -> Bench:
    grid = vk.Grid(t, 16, 16)
    q, k, v = _qkv(b, grid.tokens, d, dtype)

    def rival() -> torch.Tensor:
        parts = [x.view(b, t, 256, N, d).permute(0, 2, 3, 1, 4).reshape(-1, N, t, d) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts)
        return out.view(b, 256, N, t, d).permute(0, 3, 1, 2, 4).reshape(q.shape)

    return Bench(
        id=f"temporal, T={t}, L=256, d={d}",
        op="divided_attention",
        model=model,
        dtype=dtype,
        ours=lambda: vk.divided_attention(q, k, v, grid, axis="temporal"),
        rivals={"permute + SDPA + permute": rival},
        cost=_cost(q, t * t * 256, b),
        targets={"permute + SDPA + permute": target},
    )


def _spatial(dtype: torch.dtype, b: int, t: int, target: float) -> Bench:
    grid = vk.Grid(t, 16, 16)
    q, k, v = _qkv(b, 1 + grid.tokens, 64, dtype)

    def frames(x: torch.Tensor) -> torch.Tensor:
        cls = x[:, :1].repeat_interleave(t, dim=0)
        patches = x[:, 1:].reshape(b * t, 256, N, 64)
        return torch.cat([cls, patches], dim=1).transpose(1, 2)

    def rival() -> torch.Tensor:
        out = F.scaled_dot_product_attention(*(frames(x) for x in (q, k, v))).transpose(1, 2)
        cls = out[:, 0].unflatten(0, (b, t)).mean(1, keepdim=True)
        return torch.cat([cls, out[:, 1:].reshape(b, t * 256, N, 64)], dim=1)

    return Bench(
        id=f"spatial, T={t}, 1 + 256 tokens, shared CLS",
        op="divided_attention",
        model="BT-Adapter on CLIP ViT-L/14",
        dtype=dtype,
        ours=lambda: vk.divided_attention(q, k, v, grid, axis="spatial", cls=1),
        rivals={"repeat + cat + SDPA + mean": rival},
        cost=_cost(q, t * 257 * 257, b),
        targets={"repeat + cat + SDPA + mean": target},
    )


def benches() -> list[Bench]:
    rows: list[Callable[[torch.dtype, bool], Bench]] = [
        lambda dtype, half: _temporal(dtype, 4, 8, 64, "LanguageBind ViT-L/14", 8.0 if half else 3.0),
        lambda dtype, half: _temporal(dtype, 2, 16, 88, "ST-LLM's EVA ViT-g", 4.0 if half else 3.0),
        lambda dtype, half: _spatial(dtype, 4, 8, 2.5 if half else 1.5),
    ]
    return [row(dtype, dtype == torch.bfloat16) for dtype in (torch.float32, torch.bfloat16) for row in rows]
