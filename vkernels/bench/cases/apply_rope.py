"""apply_rope against Hugging Face's eager rotation, cos and sin given to it in the tensors' dtype."""

from __future__ import annotations

import torch

import vkernels as vk
from vkernels.bench.measure import Bench
from vkernels.spec import Cost


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _bench(dtype: torch.dtype, inplace: bool) -> Bench:
    s, n, d = 8192, 32, 128
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, s, n, d, generator=generator).to(dtype) for _ in range(2))
    spec, pos = vk.RopeSpec.build(d), torch.arange(s)
    frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(pos.double(), frequency).repeat(1, 2)[None, :, None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    mine = [q.clone(), k.clone()] if inplace else [q, k]

    def rival() -> tuple[torch.Tensor, torch.Tensor]:
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    return Bench(
        id="apply_rope, q and k 8,192 x 32 x 128" + (", in place" if inplace else ""),
        op="apply_rope",
        model="Vicuna-7B at 32 frames",
        dtype=dtype,
        ours=lambda: vk.apply_rope(mine[0], mine[1], spec, pos, inplace=inplace),
        rivals={"Hugging Face eager": rival},
        cost=Cost(flop=6.0 * q.numel(), bytes=4.0 * q.numel() * q.element_size()),
        targets={"Hugging Face eager": 15.0},
        compare=not inplace,  # in place, the input of the second call is the output of the first
    )


def benches() -> list[Bench]:
    return [_bench(dtype, inplace) for dtype in (torch.float32, torch.bfloat16) for inplace in (False, True)]
