"""Evidence for decode_attention."""

from __future__ import annotations

import torch

from vkernels.check import ShapeError
from vkernels.kv_cache import FULL, KVCache
from vkernels.ops.decode_attention.api import BACKENDS, Call, decode_attention, prepare
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject, Shape


def _inputs(m: Maker, scheme: str, s: int, b: int, heads: tuple[int, int], d: int, length: int, **options) -> dict:
    n, kv = heads
    call = {name: options.pop(name) for name in ("window", "return_lse") if name in options}
    capacity = options.pop("capacity", max(length, 1))
    cache = KVCache(scheme, b=b, m=kv, d=d, capacity=capacity, dtype=m.dtype, device=m.device, **options)
    k, v = (m.randn(b, length, kv, d).to(cache.dtype) for _ in "kv")
    cache.append(k, v, backend="reference")
    return {"q": m.randn(b, s, n, d), "cache": cache, **call}


def _blank(m: Maker, scheme: str, s: int, b: int, heads: tuple[int, int], d: int, length: int, **options) -> dict:
    """A cache that says it holds `length` tokens; its storage is whatever it is."""
    n, kv = heads
    cache = KVCache(scheme, b=b, m=kv, d=d, capacity=length, dtype=m.dtype, device=m.device, **options)
    cache.advance(length)
    return {"q": m.randn(b, s, n, d), "cache": cache}


def _cost(call: Call) -> Cost:
    held = sum(len(call.cache.positions(i)) for i in range(call.cache.b))
    _, s, n, d = call.q.shape
    bits = call.cache.bits or 8 * FULL[call.cache.scheme].itemsize
    return Cost(flop=4.0 * s * n * d * held, bytes=2.0 * held * call.cache.m * d * bits / 8 + 2.0 * call.q.nbytes)


SPEC = OpSpec(
    name="decode_attention",
    fn=decode_attention,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("bf16", lambda m: _inputs(m, "bf16", 1, 2, (4, 2), 64, 129, return_lse=True)),
        Case("int4", lambda m: _inputs(m, "int4", 1, 1, (8, 1), 128, 257, residual=64)),
        Case("int2-odd", lambda m: _inputs(m, "int2", 3, 1, (2, 2), 72, 127, group=32, residual=32, sinks=3)),
        Case("int8-ring", lambda m: _inputs(m, "int8", 2, 1, (2, 1), 40, 200, residual=0, ring=True, capacity=64)),
        Case("int4-paged", lambda m: _inputs(m, "int4", 1, 2, (2, 2), 64, 257, residual=64, page=64, window=150)),
        Case("empty", lambda m: _inputs(m, "int4", 1, 1, (2, 2), 64, 0)),
    ],
    shapes=[
        Shape("llama", lambda m: _blank(m, "bf16", 1, 1, (32, 32), 128, 8192), "LLaMA-7B, 8,192 tokens"),
        Shape("qwen", lambda m: _blank(m, "bf16", 8, 8, (28, 4), 128, 8192, page=64), "Qwen2-VL-7B, 8 x 8 queries"),
        Shape("ring_72", lambda m: _blank(m, "bf16", 1, 1, (16, 16), 72, 4096, ring=True, sinks=4), "head size 72"),
        Shape("llama_int8", lambda m: _blank(m, "int8", 1, 1, (32, 32), 128, 8192), "LLaMA-7B, 8 bit"),
        Shape("llama_int4", lambda m: _blank(m, "int4", 1, 1, (32, 32), 128, 8192), "LLaMA-7B, 4 bit"),
        Shape("llama_int2", lambda m: _blank(m, "int2", 1, 1, (32, 32), 128, 8192, group=32), "LLaMA-7B, 2 bit (INTP)"),
        Shape("qwen_int4", lambda m: _blank(m, "int4", 1, 8, (28, 4), 128, 8192, group=128, page=128), "Qwen2-VL-7B"),
        Shape("float32", lambda m: _blank(m, "fp32", 1, 1, (28, 4), 128, 4096), "float32", dtypes=(torch.float32,)),
    ],
    rows=[
        Shape("d256", lambda m: _blank(m, "bf16", 1, 1, (4, 4), 256, 512), "Gemma's head size"),
        Shape("float32-d256", lambda m: _blank(m, "fp32", 1, 1, (4, 4), 256, 512), "float32", (torch.float32,)),
        Shape("int4-d64", lambda m: _blank(m, "int4", 1, 1, (4, 4), 64, 512), "codes of a ViT's head size"),
        Shape("int4-d112", lambda m: _blank(m, "int4", 1, 1, (4, 4), 112, 512), "codes, heads between 64 and 128"),
        Shape("int4-d256", lambda m: _blank(m, "int4", 1, 1, (4, 4), 256, 512), "codes of Gemma's head size"),
        Shape(
            "int4-float32",
            lambda m: _blank(m, "int4", 1, 1, (4, 4), 256, 512),
            "float32 queries of 256 beside their tf32 halves",
            (torch.float32,),
            spills=144,
        ),
    ],
    rejects=[
        Reject(
            "head size",
            lambda m: {**_inputs(m, "int4", 1, 1, (2, 2), 64, 3), "q": m.randn(1, 1, 2, 32)},
            ShapeError,
            r"decode_attention: q must have shape \(1 s n 64\), got \(1, 1, 2, 32\)",
        ),
        Reject(
            "heads",
            lambda m: {**_inputs(m, "int4", 1, 1, (2, 2), 64, 3), "q": m.randn(1, 1, 3, 64)},
            ValueError,
            r"decode_attention: q must have a multiple of 2 heads, got 3",
        ),
        Reject(
            "queries",
            lambda m: {**_inputs(m, "int4", 1, 1, (2, 2), 64, 3), "q": m.randn(1, 9, 2, 64)},
            ValueError,
            r"decode_attention: q must hold 1 to 8 tokens, got 9",
        ),
    ],
    cost=_cost,
    band=(2.0, "codes and zeros are summed apart, and either sum is several times larger than the output they make"),
    source="KIVI, arXiv:2402.02750",
)
