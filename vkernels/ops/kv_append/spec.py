"""Evidence for kv_append: what is stored is compared, bit by bit."""

from __future__ import annotations

import torch

from vkernels.check import ShapeError
from vkernels.kv_cache import KVCache
from vkernels.ops.kv_append.api import BACKENDS, Call, kv_append, prepare
from vkernels.spec import Blank, Case, Cost, Maker, OpSpec, Reject, Shape


def _inputs(m: Maker, scheme: str, b: int, kv: int, d: int, before: int, s: int, **options) -> dict:
    """`s` more tokens for a cache that holds `before`."""
    capacity = options.pop("capacity", before + s)
    cache = KVCache(scheme, b=b, m=kv, d=d, capacity=capacity, dtype=m.dtype, device=m.device, **options)
    if isinstance(m, Blank):
        cache.reserve(before)
        cache.advance(before)
        return {"cache": cache, "k": m.randn(b, s, kv, d).to(cache.dtype), "v": m.randn(b, s, kv, d).to(cache.dtype)}
    draw = [m.randn(b, length, kv, d).to(cache.dtype) for length in (before, before, s, s)]
    cache.append(draw[0], draw[1], backend="reference")
    return {"cache": cache, "k": draw[2], "v": draw[3]}


def _stored(cache: KVCache) -> list[torch.Tensor]:
    return [cache.lengths, *(t for t in cache.tensors() if t is not None)]


def _cost(call: Call) -> Cost:
    elements = call.k.numel() + call.v.numel()
    width = call.cache.bits / 8 or call.k.element_size()
    return Cost(flop=4.0 * elements if call.cache.bits else 0.0, bytes=elements * (call.k.element_size() + width))


SPEC = OpSpec(
    name="kv_append",
    fn=kv_append,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("bf16", lambda m: _inputs(m, "bf16", 2, 2, 64, 5, 60)),
        Case("int4", lambda m: _inputs(m, "int4", 1, 2, 64, 100, 157, residual=64)),
        Case("int2-odd", lambda m: _inputs(m, "int2", 1, 3, 72, 33, 70, group=32, residual=32, sinks=3)),
        Case("int8-ring", lambda m: _inputs(m, "int8", 1, 1, 40, 70, 130, residual=0, ring=True, capacity=64)),
        Case("int4-paged", lambda m: _inputs(m, "int4", 2, 1, 64, 60, 140, residual=64, page=64)),
        Case("one token", lambda m: _inputs(m, "int4", 1, 1, 64, 127, 1, residual=64)),
    ],
    shapes=[
        Shape("bf16", lambda m: _inputs(m, "bf16", 1, 32, 128, 512, 512), "LLaMA-7B, 512 tokens after 512"),
        Shape("int4", lambda m: _inputs(m, "int4", 1, 32, 128, 512, 512), "LLaMA-7B"),
        Shape("int2", lambda m: _inputs(m, "int2", 4, 4, 128, 600, 1, group=128, sinks=4, page=128), "Qwen2-VL, paged"),
        Shape("int8-72", lambda m: _inputs(m, "int8", 1, 16, 72, 729, 729, group=32, ring=True, capacity=1024), "ViT"),
    ],
    rejects=[
        Reject(
            "head size",
            lambda m: {**_inputs(m, "int4", 1, 2, 64, 3, 1), "k": m.randn(1, 1, 2, 32)},
            ShapeError,
            r"kv_append: k must have shape \(1 s 2 64\), got \(1, 1, 2, 32\)",
        ),
        Reject(
            "overflow",
            lambda m: _inputs(m, "int4", 1, 2, 64, 3, 2, capacity=4),
            ValueError,
            r"kv_append: k must fit the capacity \(4 tokens\), got 5 tokens",
        ),
        Reject(
            "dtype",
            lambda m: {**_inputs(m, "int4", 1, 2, 64, 3, 1), "v": m.randn(1, 1, 2, 64).half()},
            TypeError,
            r"kv_append: v must have the dtype of the cache \(float32\), got float16",
        ),
        Reject(
            "count",
            lambda m: {**_inputs(m, "int4", 1, 2, 64, 3, 1), "count": [2]},
            ValueError,
            r"kv_append: count must be 1 numbers of tokens up to 1, got \[2\]",
        ),
    ],
    cost=_cost,
    source="KIVI, arXiv:2402.02750",
    exact=True,
    outputs=_stored,
)
