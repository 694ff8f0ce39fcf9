"""Lowering a mask against building FlexAttention's block mask for the same predicate: 8,192 tokens."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import create_block_mask

import vkernels as vk
from vkernels.bench.measure import Bench
from vkernels.spec import Cost

S = 8192


def benches() -> list[Bench]:
    grid = vk.Grid(32, 16, 16)
    keep = torch.rand(S, generator=torch.Generator().manual_seed(0)) < 0.5
    cases = {
        "frame-causal": (lambda: vk.VideoMask.frame_causal(grid), lambda b, h, q, k: k // 256 <= q // 256),
        "keep 50 %": (lambda: vk.VideoMask.joint(grid).keep(keep), lambda b, h, q, k: keep[k]),
    }
    return [
        Bench(
            id=f"mask lowering, {S:,} tokens, {name}",
            op="lower_mask",
            dtype=torch.int32,
            ours=lambda mask=mask: vk.lower_mask(mask(), "cpu"),
            rivals={
                "create_block_mask": lambda rule=rule: create_block_mask(rule, None, None, S, S, device="cpu"),
            },
            cost=Cost(flop=0.0, bytes=4.0 * 2 * S),
            targets={"create_block_mask": 100.0},
            compare=False,
        )
        for name, (mask, rule) in cases.items()
    ]
