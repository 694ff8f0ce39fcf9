"""decode_attention against SDPA on what the cache decodes to, kept at full width in its own layout, and against
decoding it first; kv_append against copying the tokens, and against the scheme in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from vkernels.bench import rivals as room
from vkernels.bench.problem import Call, Problem
from vkernels.bench.rivals.sdpa import GPU_ONLY, KERNELS, heads_first


def _one_query(problem: Problem) -> bool:
    """Without a window, one query per sequence, all of one length: what SDPA takes without a mask."""
    q, cache = problem.kwargs["q"], problem.kwargs["cache"]
    lengths = {cache.length(i) for i in range(cache.b)}
    return problem.kwargs.get("window") is None and q.shape[1] == 1 and len(lengths) == 1 and lengths != {0}


def _kept(kernel: str) -> room.Prepare:
    def prepared(problem: Problem) -> Call | None:
        if not _one_query(problem):
            return None
        q, cache, scale = problem.kwargs["q"], problem.kwargs["cache"], problem.kwargs.get("scale")
        keys, values = (x.to(q.dtype).transpose(1, 2).contiguous() for x in cache.dequantised())
        return lambda: heads_first(q.transpose(1, 2), keys, values, kernel, scale=scale).transpose(1, 2)

    return prepared


for kernel in KERNELS:
    gpu = kernel in GPU_ONLY
    room.rival(f"SDPA {kernel}, cache at full width", "decode_attention", gpu=gpu)(_kept(kernel))


@room.rival("decode the cache, then SDPA", "decode_attention")
def decoded(problem: Problem) -> Call | None:
    q, cache, scale = problem.kwargs["q"], problem.kwargs["cache"], problem.kwargs.get("scale")
    if not _one_query(problem) or not cache.bits:
        return None

    def call() -> Any:
        keys, values = (x.to(q.dtype).transpose(1, 2) for x in cache.dequantised())
        return heads_first(q.transpose(1, 2), keys, values, None, scale=scale).transpose(1, 2)

    return call


@room.rival("a copy at full width", "kv_append", compare=False)
def copy(problem: Problem) -> Call:
    k, v = problem.kwargs["k"], problem.kwargs["v"]
    keys, values = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (k, v))

    def call() -> None:
        keys.copy_(k.transpose(1, 2))
        values.copy_(v.transpose(1, 2))

    return call


def _codes(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes packed into words, delta and zero, groups along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    delta = (high - low) / (2**bits - 1)
    codes = ((x - low) / delta).round().clamp(0, 2**bits - 1).to(torch.int32)
    shift = torch.arange(32 // bits, dtype=torch.int32, device=x.device) * bits
    return (codes.unflatten(-1, (-1, 32 // bits)) << shift).sum(-1, dtype=torch.int32), delta, low


@room.rival("plain PyTorch quantiser", "kv_append", compare=False)  # it packs its codes in another order
def quantised(problem: Problem) -> Call | None:
    k, v, cache = (problem.kwargs[name] for name in ("k", "v", "cache"))
    (b, s, m, d), group, bits = k.shape, cache.group, cache.bits
    if not bits or s % group or d % group:
        return None

    def call() -> Any:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        by_channel = _codes(keys.reshape(b * m, s // group, group, d), 2, bits)
        return by_channel, _codes(values.reshape(b * m, s, d // group, group), 3, bits)

    return call
