"""rearrange against the eager chains of LLaVA-OneVision (pool, newline, masked_scatter), of token dropping (boolean
index, LayerNorm) and of divided attention (permute, contiguous)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels as vk
from vkernels import rearrangement as plans
from vkernels.bench.measure import Bench
from vkernels.spec import Cost

DTYPES = (torch.float32, torch.bfloat16)


def _draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _pool(dtype: torch.dtype) -> Bench:
    t, h, w, c, out = 64, 27, 27, 3584, 14
    x, line = _draw(t, h * w, c, dtype=dtype), _draw(c, dtype=dtype, seed=1)
    video = t * out * (out + 1)
    is_video = torch.zeros(video + 64, dtype=torch.bool)
    is_video[20 : 20 + video] = True
    text = _draw(1, len(is_video), c, dtype=dtype, seed=2)
    plan = plans.pool(t, h, w, mode="bilinear", stride=2).compose(plans.newline(t, out, out))
    rows = plans.rows_of(is_video, video)
    embeds, rival_embeds = text.clone(), text.clone()

    def ours() -> torch.Tensor:
        return vk.rearrange(x.view(1, -1, c), plan, fill=line[None], out=embeds, rows=rows)

    def rival() -> torch.Tensor:
        grid = x.view(t, h, w, c).permute(0, 3, 1, 2).contiguous()
        grid = F.interpolate(grid, size=(out, out), mode="bilinear").permute(0, 2, 3, 1)
        lines = line.expand(t, out, 1, c)
        features = torch.cat([grid, lines], dim=2).reshape(-1, c)
        return rival_embeds.masked_scatter(is_video[None, :, None], features)

    moved = (x.numel() + video * c) * x.element_size()
    return Bench(
        id="27x27 -> 14x14 pool + newline + into embeddings, 64 frames",
        op="rearrange",
        model="LLaVA-OneVision-7B",
        dtype=dtype,
        ours=ours,
        rivals={"permute + pool + cat + scatter": rival},
        cost=Cost(flop=8.0 * t * out * out * c, bytes=float(moved)),
        targets={"permute + pool + cat + scatter": 15.0},
    )


def _keep(dtype: torch.dtype) -> Bench:
    s, c = 8192, 4096
    x, weight, bias = _draw(1, s, c, dtype=dtype), torch.ones(c, dtype=dtype), torch.zeros(c, dtype=dtype)
    mask = torch.zeros(s, dtype=torch.bool)
    mask[torch.randperm(s, generator=torch.Generator().manual_seed(3))[: s // 2]] = True
    plan = plans.keep(mask)
    return Bench(
        id="keep 50% of 8,192 x 4,096 + LayerNorm",
        op="rearrange",
        model="ST-LLM",
        dtype=dtype,
        ours=lambda: vk.rearrange(x, plan, norm="layer", norm_weight=weight, norm_bias=bias),
        rivals={"boolean index + layer_norm": lambda: F.layer_norm(x[:, mask], (c,), weight, bias)},
        cost=Cost(flop=8.0 * s // 2 * c, bytes=float(s * c * x.element_size())),
        targets={"boolean index + layer_norm": 1.5},
    )


def _permute(dtype: torch.dtype) -> Bench:
    x = _draw(64, 256, 1024, dtype=dtype)
    plan = plans.from_einops("t l c -> l t c")
    return Bench(
        id="t l c -> l t c, 64 x 256 x 1,024",
        op="rearrange",
        model="TimeSformer",
        dtype=dtype,
        ours=lambda: vk.rearrange(x, plan),
        rivals={"permute + contiguous": lambda: x.permute(1, 0, 2).contiguous()},
        cost=Cost(flop=0.0, bytes=2.0 * x.numel() * x.element_size()),
    )


def benches() -> list[Bench]:
    return [make(dtype) for dtype in DTYPES for make in (_pool, _keep, _permute)]
