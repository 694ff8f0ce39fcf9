"""Evidence for decode_attention."""

from __future__ import annotations

from vkernels.check import ShapeError
from vkernels.kv_cache import FULL, KVCache
from vkernels.ops.decode_attention.api import BACKENDS, Call, decode_attention, prepare
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject


def _inputs(m: Maker, scheme: str, s: int, b: int, heads: tuple[int, int], d: int, length: int, **options) -> dict:
    n, kv = heads
    call = {name: options.pop(name) for name in ("window", "return_lse") if name in options}
    capacity = options.pop("capacity", max(length, 1))
    cache = KVCache(scheme, b=b, m=kv, d=d, capacity=capacity, dtype=m.dtype, device=m.device, **options)
    k, v = (m.randn(b, length, kv, d).to(cache.dtype) for _ in "kv")
    cache.append(k, v, backend="reference")
    return {"q": m.randn(b, s, n, d), "cache": cache, **call}


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
