"""The sizes this library set itself targets at: the README's table, and what the quick selection is taken from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import vkernels as vk
from vkernels.bench import make
from vkernels.bench.case import Case
from vkernels.bench.problem import Call, Problem
from vkernels.bench.rivals.moves import pooled
from vkernels.rearrangement import from_einops, keep, newline, pool, rows_of

FP32, BF16 = torch.float32, torch.bfloat16


def _targets(rival: str, fp32: float, bf16: float) -> dict[tuple[str, torch.dtype], float]:
    return {(rival, FP32): fp32, (rival, BF16): bf16}


def _kept(s: int, share: float) -> torch.Tensor:
    return torch.rand(s, generator=torch.Generator().manual_seed(2)) < share


def _attention() -> list[Case]:
    def causal(t: int, side: int) -> dict[str, Any]:
        grid, frame = vk.Grid(t, side, side), side * side
        return {"mask": lambda: vk.VideoMask.frame_causal(grid), "visible": lambda b, h, q, k: k // frame <= q // frame}

    def kept(share: float, queries: bool) -> vk.VideoMask:
        return vk.VideoMask.joint(vk.Grid(16, 16, 16)).keep(_kept(4096, share), queries=queries)

    dense, flex = "SDPA flash, dense mask", "FlexAttention"
    return [
        make.attention(
            "joint, 2,048 tokens, no mask", 1, 2048, 16, 64, targets=_targets("SDPA flash", 1.15, 1.7),
            quick={FP32: "SDPA flash", BF16: "SDPA flash"},
        ),
        make.attention(
            "one frame, 196 tokens, no mask", 1, 196, 12, 64, model="ViT-B/16", quick={FP32: "SDPA flash"},
        ),
        make.attention(
            "frame-causal, T=8, L=256", 1, 2048, 16, 64, **causal(8, 16), backward=True, quick={BF16: dense},
            targets=_targets(dense, 2.1, 3.0) | _targets(flex, 4.0, 6.0),
        ),
        make.attention(
            "frame-causal, T=32, L=64", 1, 2048, 16, 64, **causal(32, 8),
            targets=_targets(dense, 2.3, 3.2) | _targets(flex, 4.0, 6.0),
        ),
        make.attention(
            "keep 50% of 4,096, tokens", 1, 4096, 16, 64, lambda: kept(0.5, True), targets=_targets(dense, 4.0, 6.0)
        ),
        make.attention(
            "keep 25% of 4,096, tokens", 1, 4096, 16, 64, lambda: kept(0.25, True), targets=_targets(dense, 14.0, 20.0)
        ),
        make.attention(
            "keep 50% of 4,096, keys only", 1, 4096, 16, 64, lambda: kept(0.5, False), targets=_targets(dense, 2.2, 3.5)
        ),
    ]  # fmt: skip


def _divided() -> list[Case]:
    permute, split = "permute + SDPA flash", "split + SDPA flash"
    return [
        make.divided(
            "temporal, T=8, L=256, d=64", 4, vk.Grid(8, 16, 16), 16, 64, "temporal", model="LanguageBind ViT-L/14",
            targets=_targets(permute, 3.0, 8.0), quick={BF16: "permute + SDPA flash + permute back"}, backward=True,
        ),
        make.divided(
            "temporal, T=16, L=256, d=88", 2, vk.Grid(16, 16, 16), 16, 88, "temporal", model="ST-LLM's EVA ViT-g",
            targets=_targets(permute, 3.0, 4.0),
        ),
        make.divided(
            "spatial, T=8, 1 + 256 tokens, shared CLS", 4, vk.Grid(8, 16, 16), 16, 64, "spatial", cls=1,
            model="BT-Adapter on CLIP ViT-L/14", targets=_targets(split, 1.5, 2.5),
            quick={FP32: "split + SDPA flash + merge"},
        ),
    ]  # fmt: skip


def _masks() -> list[Case]:
    grid, kept = vk.Grid(32, 16, 16), _kept(8192, 0.5)
    targets = {("create_block_mask", torch.int32): 100.0}
    return [
        make.lowering(
            "mask lowering, 8,192 tokens, frame-causal", lambda: vk.VideoMask.frame_causal(grid),
            lambda b, h, q, k: k // 256 <= q // 256, dtypes=(torch.int32,), targets=targets,
        ),
        make.lowering(
            "mask lowering, 8,192 tokens, keep 50%", lambda: vk.VideoMask.joint(grid).keep(kept),
            lambda b, h, q, k: kept[k], dtypes=(torch.int32,), targets=targets,
        ),
    ]  # fmt: skip


def _rope() -> list[Case]:
    spec, targets = vk.RopeSpec.build(128), _targets("Hugging Face eager", 15.0, 15.0)

    def rotation(**more: Any) -> Case:
        where = ", in place" if more.get("inplace") else ""
        return make.rotation(
            f"q and k 8,192 x 32 x 128{where}", 8192, 32, spec, lambda: torch.arange(8192),
            model="Vicuna-7B at 32 frames", targets=targets, **more,
        )  # fmt: skip

    return [rotation(quick={BF16: "Hugging Face eager"}), rotation(inplace=True)]


def _prologues() -> list[Case]:
    spec = vk.RopeSpec.build(128, 5e6, axes="mrope_interleaved", sections=(24, 20, 20))
    return [
        make.prologue(
            "norm + interleaved M-RoPE + cache, s=4096, n=32, m=8, d=128", 4096, (32, 8), spec,
            lambda: vk.rope_positions("qwen2_vl", [(4, 32, 32)]), norms=True, cache="full", model="Qwen3-VL",
            targets=_targets("Hugging Face eager", 10.0, 10.0), quick={BF16: "Hugging Face eager"},
        )
    ]  # fmt: skip


def _moves() -> list[Case]:
    by_rows = "permute or index_select, norm"
    return [
        _pooled(),
        make.move(
            "keep 50% of 8,192 x 4,096 + LayerNorm", (1, 8192, 4096), _half, norm=True, model="ST-LLM",
            targets=_targets(by_rows, 1.5, 1.5), quick={BF16: by_rows},
        ),
        make.move(
            "t l c -> l t c, 64 x 256 x 1,024", (64, 256, 1024), lambda: from_einops("t l c -> l t c"),
            model="TimeSformer", quick={FP32: by_rows},
        ),
    ]  # fmt: skip


def _half() -> Any:
    mask = torch.zeros(8192, dtype=torch.bool)
    mask[torch.randperm(8192, generator=torch.Generator().manual_seed(3))[:4096]] = True
    return keep(mask)


def _pooled() -> Case:
    """LLaVA-OneVision: pool, a newline behind every row, into the rows of the embeddings."""
    t, side, c, out = 64, 27, 3584, 14
    video = t * out * (out + 1)
    is_video = torch.zeros(video + 64, dtype=torch.bool)
    is_video[20 : 20 + video] = True

    def given(m: Any) -> dict[str, Any]:
        return {
            "x": m.randn(1, t * side * side, c),
            "plan": pool(t, side, side, mode="bilinear", stride=2).compose(newline(t, out, out)),
            "fill": m.randn(1, c),
            "out": m.randn(1, len(is_video), c),
            "rows": rows_of(is_video, video).to(m.device),
        }

    def eager(problem: Problem) -> Call:
        x, line, text = (problem.kwargs[name] for name in ("x", "fill", "out"))
        text, there = text.clone(), is_video[None, :, None].to(x.device)

        def call() -> torch.Tensor:
            grid = pooled(x, t, side, out).view(t, out, out, c)
            features = torch.cat([grid, line.expand(t, out, 1, c)], dim=2).reshape(-1, c)
            return text.masked_scatter(there, features)

        return call

    name = "permute + pool + cat + masked_scatter"
    return Case(
        "rearrange", "27x27 -> 14x14 pool + newline + into embeddings, 64 frames", given, model="LLaVA-OneVision-7B",
        frames=64, rivals={name: eager}, targets=_targets(name, 15.0, 15.0),
    )  # fmt: skip


def _caches() -> list[Case]:
    vicuna: dict[str, Any] = {"model": "Vicuna-7B at 64 frames", "dtypes": (BF16,)}
    flash = "SDPA flash, cache at full width"
    return [
        make.decode(
            f"decode, 16,384 keys, 32 heads, d=128, {scheme} cache", scheme, 32, 128, 16384, **vicuna,
            targets={(flash, BF16): target}, quick={BF16: flash} if scheme != "int2" else {},
        )
        for scheme, target in (("bf16", 4.0), ("int4", 8.0), ("int2", 10.0))
    ] + [
        make.append("append 16,384 tokens to an int4 cache", "int4", 32, 128, 16384, **vicuna),
        make.append(
            "append 4,096 tokens to a bf16 cache", "bf16", 32, 128, 4096, **vicuna, quick={BF16: "a copy at full width"}
        ),
    ]  # fmt: skip


def own_cases() -> list[Case]:
    cases = [*_attention(), *_divided(), *_masks(), *_rope(), *_prologues(), *_moves(), *_caches()]
    return [replace(case, always=True) for case in cases]
