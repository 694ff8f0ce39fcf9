"""Evidence for qkv_prologue."""

from __future__ import annotations

from typing import Any

import torch

from vkernels.check import ShapeError
from vkernels.kv_cache import KVCache
from vkernels.ops.qkv_prologue.api import BACKENDS, Call, prepare, qkv_prologue
from vkernels.rope import RopeSpec, rope_positions
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject, Shape


def _inputs(m: Maker, b: int, s: int, n: int, kv: int, d: int, spec: RopeSpec | None, **rest: Any) -> dict[str, Any]:
    given = {} if spec is None else {"spec": spec, "pos": torch.arange(s, device=m.device)}
    return {"qkv": m.randn(b, s, (n + 2 * kv) * d), "n": n, "m": kv, **given, **rest}


def _norms(m: Maker, q: int, k: int) -> dict[str, Any]:
    return {"q_norm": m.randn(q), "k_norm": m.randn(k)}


def _mrope(m: Maker) -> dict[str, Any]:
    spec = RopeSpec.build(128, 1e6, axes="mrope_interleaved", sections=(24, 20, 20))
    pos = rope_positions("qwen2_vl", [2, (2, 2, 3)], device=m.device)
    return {**_inputs(m, 1, 14, 4, 2, 128, spec), "pos": pos, **_norms(m, 128, 128)}


def _llama(m: Maker) -> dict[str, Any]:
    cache = KVCache("bf16", b=1, m=32, d=128, capacity=2048)
    return {**_inputs(m, 1, 2048, 32, 32, 128, RopeSpec.build(128)), "cache": cache}


def _qwen(m: Maker) -> dict[str, Any]:
    spec = RopeSpec.build(128, 1e6, axes="mrope_interleaved", sections=(24, 20, 20))
    given = _inputs(m, 1, 8192, 32, 8, 128, spec, bias=m.randn(48 * 128), **_norms(m, 128, 128))
    return {**given, "pos": torch.zeros(3, 8192, dtype=torch.int64)}


def _tower(m: Maker, d: int, side: int, **rest: Any) -> dict[str, Any]:
    spec = RopeSpec.grid((d // 2, d // 2), layout="pair")
    given = _inputs(m, 8, side * side, 16, 16, d, spec, bias=m.randn(48 * d), **rest)
    return {**given, "pos": torch.zeros(2, side * side, dtype=torch.int64)}


def _cost(call: Call) -> Cost:
    return Cost(flop=8.0 * call.qkv.numel(), bytes=2.0 * call.qkv.numel() * call.qkv.element_size())


_PART = RopeSpec.build(20, 1e6, "yarn", factor=4, original=32768, layout="pair", offset=3)

SPEC = OpSpec(
    name="qkv_prologue",
    fn=qkv_prologue,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("split_only", lambda m: _inputs(m, 2, 5, 3, 1, 10, None)),
        Case("rope_bias", lambda m: _inputs(m, 2, 5, 4, 2, 32, RopeSpec.build(32), bias=m.randn(8 * 32))),
        Case("mrope_norm", _mrope),
        Case(
            "post_part",
            lambda m: _inputs(
                m, 2, 5, 3, 1, 27, _PART, bias=m.randn(5 * 27), norm_order="post", norm_offset=1.0, **_norms(m, 27, 27)
            ),
        ),
        Case("all", lambda m: _inputs(m, 1, 6, 4, 2, 24, RopeSpec.build(24), norm_scope="all", **_norms(m, 96, 48))),
        Case(
            "all_post",
            lambda m: _inputs(
                m, 1, 6, 2, 2, 24, RopeSpec.build(16), norm_scope="all", norm_order="post", **_norms(m, 48, 48)
            ),
        ),
        Case("k_norm", lambda m: _inputs(m, 1, 70, 2, 1, 16, None, k_norm=m.randn(16), bias=m.randn(64))),
        Case("empty", lambda m: _inputs(m, 1, 0, 2, 1, 16, RopeSpec.build(16), bias=m.randn(64))),
    ],
    shapes=[
        Shape("llama", _llama, "LLaMA-7B, 2,048 tokens into a cache", gradients=False),
        Shape("qwen3_vl", _qwen, "Qwen3-VL-8B, 8,192 tokens", dtypes=(torch.bfloat16, torch.float32)),
        Shape("vit64", lambda m: _inputs(m, 8, 257, 16, 16, 64, None, bias=m.randn(48 * 64)), "CLIP ViT-L/14"),
        Shape("vit72", lambda m: _tower(m, 72, 27), "SigLIP with two axes"),
        Shape("vit88", lambda m: _inputs(m, 8, 257, 16, 16, 88, None, bias=m.randn(48 * 88)), "EVA-g"),
        Shape(
            "all",
            lambda m: _inputs(
                m, 1, 8192, 12, 12, 128, RopeSpec.build(128, layout="pair"), norm_scope="all", **_norms(m, 1536, 1536)
            ),
            "Wan 1.3B: norms over all heads",
        ),
    ],
    rejects=[
        Reject(
            "rank", lambda m: {"qkv": m.randn(4, 8), "n": 2, "m": 1}, ShapeError, r"qkv_prologue: qkv must have shape"
        ),
        Reject(
            "columns",
            lambda m: {"qkv": m.randn(1, 2, 9), "n": 2, "m": 1},
            ValueError,
            r"qkv_prologue: qkv must have \(n \+ 2 m\) d columns with n=2, m=1, got 9",
        ),
        Reject(
            "norm",
            lambda m: {**_inputs(m, 1, 2, 2, 1, 8, None), "q_norm": m.randn(16)},
            ShapeError,
            r"qkv_prologue: q_norm must have shape \(8\)",
        ),
        Reject(
            "pos",
            lambda m: {**_inputs(m, 1, 2, 2, 1, 8, RopeSpec.build(8)), "pos": None},
            ValueError,
            "qkv_prologue: pos must be given exactly where spec is",
        ),
    ],
    cost=_cost,
    source="QK-norm, arXiv:2302.05442; M-RoPE, arXiv:2409.12191",
    differentiable=("qkv", "bias", "q_norm", "k_norm"),
)
