"""decode_attention against SDPA on a bf16 cache, and the quantising append against the same scheme in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels as vk
from vkernels.bench.measure import Bench
from vkernels.spec import Cost

KEYS, HEADS, D = 16384, 32, 128


def _past() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, KEYS, HEADS, D, generator=generator).bfloat16() for _ in "kv")  # type: ignore[return-value]


def _decode(scheme: str, k: torch.Tensor, v: torch.Tensor, target: float) -> Bench:
    cache = vk.KVCache(scheme, b=1, m=HEADS, d=D, capacity=KEYS)
    cache.append(k, v)
    q = torch.randn(1, 1, HEADS, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    # The rival reads what this cache decodes to, as a bf16 cache in its own layout: same answer, 16 bits an element.
    keys, values = (x.transpose(1, 2).contiguous() for x in cache.dequantised())
    return Bench(
        id=f"decode, 16,384 keys, 32 heads, d=128, {scheme} cache",
        op="decode_attention",
        model="Vicuna-7B at 64 frames",
        dtype=torch.bfloat16,
        ours=lambda: vk.decode_attention(q, cache),
        rivals={
            "SDPA, bf16 cache": lambda: F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)
        },
        cost=Cost(flop=4.0 * KEYS * HEADS * D, bytes=float(cache.bytes)),
        targets={"SDPA, bf16 cache": target},
        tolerance=3e-2,
    )


def _kivi(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes packed eight to a word, delta and zero, groups of 64 along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    delta = (high - low) / 15
    codes = ((x - low) / delta).round().clamp(0, 15).to(torch.int32)
    shift = torch.arange(8, dtype=torch.int32) * 4
    return (codes.unflatten(-1, (-1, 8)) << shift).sum(-1, dtype=torch.int32), delta, low


def _append(k: torch.Tensor, v: torch.Tensor) -> Bench:
    cache = vk.KVCache("int4", b=1, m=HEADS, d=D, capacity=KEYS)

    def rival() -> object:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        return _kivi(keys.reshape(HEADS, -1, 64, D), 2), _kivi(values.reshape(HEADS, KEYS, 2, 64), 3)

    return Bench(
        id="append 16,384 tokens to an int4 cache",
        op="kv_append",
        model="Vicuna-7B at 64 frames",
        dtype=torch.bfloat16,
        ours=lambda: cache.reset().append(k, v),
        rivals={"plain PyTorch quantiser": rival},
        cost=Cost(flop=8.0 * k.numel(), bytes=2.0 * k.nbytes + cache.bytes),
        compare=False,  # the two pack their codes in different orders; the tests compare what they decode to
    )


def benches() -> list[Bench]:
    k, v = _past()
    decodes = [_decode(scheme, k, v, target) for scheme, target in (("bf16", 4.0), ("int4", 8.0), ("int2", 10.0))]
    return [*decodes, _append(k, v)]
