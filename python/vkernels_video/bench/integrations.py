"""transformers' own parts with random weights at real sizes, as they are and as `vkt.apply` leaves them.

The tower of Qwen2.5-VL is measured 8 layers deep in bfloat16: seven of windows, one of whole frames, as published. In
float32 two layers of windows stand for it, which is a minute instead of four. A plain key's cost beside one call per
layer is measured on a layer's attention; in the tower matrix products hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from vkernels.bench.measure import Bench
from vkernels.spec import Cost

DTYPES = (torch.float32, torch.bfloat16)
GRID = (8, 32, 32)  # 16 frames of 448 px: frames go in pairs, patches are 14 px
TOKENS = 8 * 32 * 32


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _quiet(call: Callable[..., Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _lazily(make: Callable[[], tuple[Callable[[], Any], ...]], which: int) -> Callable[[], Any]:
    """The `which`-th call of what `make` builds when it is first needed: a tower is half a gigabyte."""
    return _quiet(lambda: make()[which]())


# ---- the tower of Qwen2.5-VL


def _tower_config(depth: int, whole: list[int]) -> Any:
    from transformers import Qwen2_5_VLConfig

    sizes = dict(depth=depth, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    config = Qwen2_5_VLConfig(vision_config={**sizes, "fullatt_block_indexes": whole}).vision_config
    config._attn_implementation = "sdpa"
    return config


def _tower(dtype: torch.dtype, depth: int, whole: list[int]) -> Bench:
    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

        from vkernels_video.integrations import transformers as vkt

        stock, ours = (Tower(_tower_config(depth, whole)).to(dtype).eval() for _ in range(2))
        ours.load_state_dict(stock.state_dict())
        vkt.apply(ours)
        pixels, grid = _random(TOKENS, 3 * 2 * 14 * 14, dtype=dtype), torch.tensor([GRID])
        return tuple(lambda tower=tower: tower(pixels, grid).pooler_output for tower in (ours, stock))

    matrices = 2 * TOKENS * depth * (4 * 1280**2 + 3 * 1280 * 3420)
    pairs = TOKENS * (64 * (depth - len(whole)) + 1024 * len(whole))
    return Bench(
        id=f"Qwen2.5-VL tower, 16 frames of 448 px, depth {depth}",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"stock, sdpa": _lazily(calls, 1)},
        cost=Cost(flop=matrices + 4.0 * pairs * 1280, bytes=4.0 * TOKENS * 1280 * depth),
        targets={"stock, sdpa": 1.5},
        tolerance=5e-2,
    )


def _windows(dtype: torch.dtype) -> Bench:
    """One window layer's attention: 128 windows of 64 tokens, in one call and in one call each."""

    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from vkernels_video.integrations.transformers import register
        from vkernels_video.integrations.transformers.attention import STOCK, attention_forward

        register()
        module = torch.nn.Module()
        qkv = _random(TOKENS, 3, 16, 80, dtype=dtype)
        q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
        cu = torch.arange(0, TOKENS + 1, 64, dtype=torch.int32)
        packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=64, max_length_k=64)

        def each(attention: Callable[..., Any]) -> Callable[[], Any]:
            def run() -> Any:
                lengths = (cu[1:] - cu[:-1]).tolist()
                parts = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
                made = [attention(module, *part, None, scaling=80**-0.5, is_causal=False)[0] for part in parts]
                return torch.cat(made, dim=1)

            return run

        def whole() -> Any:
            return attention_forward(module, q, k, v, None, scaling=80**-0.5, is_causal=False, **packed)[0]

        return whole, each(STOCK["sdpa"]), each(attention_forward)

    return Bench(
        id="Qwen2.5-VL attention, 128 windows of 64, d=80: 1 call for 128",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"stock, sdpa, 128 calls": _lazily(calls, 1), "plain key, 128 calls": _lazily(calls, 2)},
        cost=Cost(flop=4.0 * TOKENS * 64 * 1280, bytes=4.0 * TOKENS * 1280 * dtype.itemsize),
        targets={"plain key, 128 calls": 5.0},
    )


# ---- pooling, merging, divided blocks


def _pooling(dtype: torch.dtype) -> Bench:
    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from vkernels_video.integrations import transformers as vkt
        from vkernels_video.integrations import zoo

        model = zoo.build("LLaVA-OneVision").model.model
        model.config.vision_config.image_size, model.config.vision_config.patch_size = 378, 14
        vkt.apply(model)
        x = _random(16, 27 * 27, 3584, dtype=dtype)
        return lambda: model.apply_pooling(x), lambda: type(model).apply_pooling(model, x)

    moved = 16 * 3584 * (27 * 27 + 14 * 14) * dtype.itemsize
    return Bench(
        id="LLaVA-OneVision pooling, 16 frames, 27x27 -> 14x14",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"stock": _lazily(calls, 1)},
        cost=Cost(flop=0.0, bytes=float(moved)),
        targets={"stock": 3.0},
    )


def _merging(dtype: torch.dtype) -> Bench:
    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from vkernels_video.integrations.transformers.merge import placeholders
        from vkernels_video.integrations.transformers.seams import Seam

        embeds, features = _random(1, 3136 + 64, 3584, dtype=dtype), _random(3136, 3584, dtype=dtype)
        mask = torch.zeros(1, 3136 + 64, 1, dtype=torch.bool)
        mask[:, 20:-44] = True
        marked = placeholders(mask, Seam("merge", "LlavaOnevisionModel", "", ""))
        return lambda: embeds.masked_scatter(marked, features), lambda: embeds.masked_scatter(mask, features)

    return Bench(
        id="16 frames of 196 rows merged into the embeddings",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"masked_scatter": _lazily(calls, 1)},
        cost=Cost(flop=0.0, bytes=2.0 * 3200 * 3584 * dtype.itemsize),
        tolerance=0.0,
    )


def _timesformer(dtype: torch.dtype) -> Bench:
    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from transformers import TimesformerConfig
        from transformers.models.timesformer.modeling_timesformer import TimesformerLayer

        from vkernels_video.integrations import transformers as vkt

        layer = TimesformerLayer(TimesformerConfig(), 0).to(dtype).eval()
        vkt.apply(layer)
        x = _random(1, 1 + 8 * 196, 768, dtype=dtype)
        return lambda: layer(x)[0], lambda: type(layer).forward(layer, x)[0]

    s, c = 8 * 196, 768
    return Bench(
        id="TimeSformer-base block, 8 frames of 14x14",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"stock": _lazily(calls, 1)},
        cost=Cost(flop=2.0 * s * c * c * (4 + 1 + 4 + 8) + 4.0 * s * (8 + 197) * c, bytes=4.0 * s * c * dtype.itemsize),
        targets={"stock": 1.5},
    )


# ---- rotary positions of every tower


def _rope(name: str, family: str, vision: bool, s: int, n: int, m: int, d: int, dtype: torch.dtype) -> Bench:
    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from importlib import import_module

        from vkernels_video.integrations.transformers import rope

        function = "apply_rotary_pos_emb_vision" if vision else "apply_rotary_pos_emb"
        stock = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), function)
        ours = rope.FUNCTIONS[function][1](rope.halves(d // 2))
        q, k = _random(s, n, d, dtype=dtype), _random(s, m, d, dtype=dtype)
        angle = _random(s, d // 2, dtype=torch.float32).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        if not vision:
            q, k, cos, sin = q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None].to(dtype), sin[None].to(dtype)
        return lambda: ours(q, k, cos, sin), lambda: stock(q, k, cos, sin)

    return Bench(
        id=f"{name} positions, {s:,} x {n} x {d}",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"stock": _lazily(calls, 1)},
        cost=Cost(flop=6.0 * s * (n + m) * d, bytes=2.0 * s * (n + m) * d * dtype.itemsize),
        targets={"stock": 4.0},
    )


def _vjepa2(dtype: torch.dtype) -> Bench:
    @cache
    def calls() -> tuple[Callable[[], Any], ...]:
        from transformers import VJEPA2Config
        from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

        from vkernels_video.integrations import transformers as vkt

        config = VJEPA2Config(crop_size=256, frames_per_clip=16)
        module = VJEPA2RopeAttention(config, 1024, 16).to(dtype).eval()
        vkt.apply(module)
        x = _random(1, 2048, 16, 64, dtype=dtype).transpose(1, 2)
        positions = module.get_position_ids(x[0].transpose(0, 1)[None])
        return (
            lambda: module.apply_rotary_embeddings(x, positions),
            lambda: type(module).apply_rotary_embeddings(module, x, positions),
        )

    return Bench(
        id="V-JEPA2 positions, 2,048 x 16 x 64",
        op="integrations",
        dtype=dtype,
        ours=_lazily(calls, 0),
        rivals={"stock": _lazily(calls, 1)},
        cost=Cost(flop=6.0 * 2048 * 1024, bytes=2.0 * 2048 * 1024 * dtype.itemsize),
        targets={"stock": 4.0},
    )


def _all() -> Iterator[Bench]:
    yield _tower(torch.float32, 2, [])
    yield _tower(torch.bfloat16, 8, [7])
    for dtype in DTYPES:
        yield _windows(dtype)
        yield _pooling(dtype)
        yield _merging(dtype)
        yield _timesformer(dtype)
        yield _rope("Qwen2.5-VL tower", "qwen2_5_vl", True, TOKENS, 16, 16, 80, dtype)
        yield _rope("Qwen3-VL tower", "qwen3_vl", True, TOKENS, 16, 16, 72, dtype)
        yield _rope("VideoLLaMA3 tower", "video_llama_3", True, TOKENS, 16, 16, 72, dtype)
        yield _rope("LLaMA", "llama", False, 4096, 32, 32, 128, dtype)
        yield _vjepa2(dtype)


def benches() -> list[Bench]:
    if find_spec("transformers") is None:
        print("integrations: transformers is not installed (pip install 'vkernels[hf]'), so nothing of it is measured")
        return []
    return list(_all())
