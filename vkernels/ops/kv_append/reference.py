"""The definition: which tokens are kept as they are, which become codes, and the quantiser."""

from __future__ import annotations

import torch

from vkernels.kv_cache import KVCache

HALF_MAX = 65504.0


def _half(x: torch.Tensor, up: bool) -> torch.Tensor:
    """float16 nearest to x that is not below (up) or not above it."""
    h = x.half()
    wrong = h.float() < x if up else h.float() > x
    bits = h.view(torch.int16)
    away = (bits >= 0) == up  # towards larger magnitude
    step = torch.where(away, 1, -1).to(torch.int16)
    zero = bits & 0x7FFF == 0  # next to zero lies the smallest subnormal of either sign
    smallest = torch.tensor(1 if up else -32767, dtype=torch.int16, device=x.device)
    return torch.where(wrong, torch.where(zero, smallest, bits + step), bits).view(torch.float16)


def quantise(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (int32, like x), delta and zero (float16, `dim` kept with size 1) of x over `dim`."""
    x = x.float().clamp(-HALF_MAX, HALF_MAX)
    top = 2**bits - 1
    zero = _half(x.amin(dim, keepdim=True), up=False)
    delta = _half((x.amax(dim, keepdim=True) - zero.float()) / top, up=True)
    inverse = torch.where(delta > 0, 1.0 / delta.float(), 0.0)
    codes = ((x - zero.float()) * inverse).round().clamp(0, top).nan_to_num(0).to(torch.int32)
    return codes, delta, zero


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., i, lane) to words (..., i / (32 / bits), lane): code i sits `bits * (i % (32 / bits))` bits up."""
    per = 32 // bits
    short = -codes.shape[-2] % per
    codes = torch.nn.functional.pad(codes, (0, 0, 0, short)).long()
    codes = codes.unflatten(-2, (-1, per))
    shift = torch.arange(per, device=codes.device)[:, None] * bits
    word = (codes << shift).sum(-2)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack(word: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`, first `count` codes."""
    shift = torch.arange(32 // bits, device=word.device)[:, None] * bits
    codes = (word.long().unsqueeze(-2) >> shift) & (2**bits - 1)
    return codes.flatten(-3, -2)[..., :count, :]


def _code_group(cache: KVCache, page: int, at: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """One group of tokens (m g d) to place `at` of `page`."""
    bits, g, d = cache.bits, cache.group, cache.d
    codes, delta, zero = quantise(k, 1, bits)
    cache.storage("k_codes")[page, :, at] = pack(codes.transpose(1, 2), bits)
    cache.storage("k_scale")[page, :, at] = torch.cat([delta, zero], 1)
    for i, c in enumerate(range(0, d, g)):
        part = v[..., c : c + g]
        codes, delta, zero = quantise(part, 2, bits)
        cache.storage("v_codes")[page, :, at, :, c : c + part.shape[-1]] = pack(codes, bits)
        cache.storage("v_scale")[page, :, at, :, i] = torch.cat([delta, zero], 2).transpose(1, 2)


def kv_append(cache: KVCache, k: torch.Tensor, v: torch.Tensor, counts: list[int]) -> None:
    layout, g = cache.layout, cache.group
    for i, count in enumerate(counts):
        old, new = cache.length(i), cache.length(i) + count
        first, end = layout.history(new)

        for name, x in (("k", k[i]), ("v", v[i])):
            if cache.sinks and old < cache.sinks:
                stop = min(new, cache.sinks)
                cache.storage(f"{name}_sink")[i, :, old:stop] = x[: stop - old].transpose(0, 1)
            if not cache.bits:
                for index in range(max(first, old - cache.sinks), end):
                    page, at = cache.place(i, index)
                    cache.storage(f"{name}_rows")[page, :, at] = x[index + cache.sinks - old]
        if not cache.bits:
            continue
        window = cache.residual + g

        def token(index: int, recent: torch.Tensor, x: torch.Tensor, i: int = i, old: int = old) -> torch.Tensor:
            position = index + cache.sinks
            return x[i, position - old] if position >= old else recent[i, :, index % (cache.residual + g)]

        for index in range(max(first, layout.history(old)[1]), end, g):
            rows = [
                torch.stack([token(index + j, recent, x) for j in range(g)], 1)
                for recent, x in ((cache.storage("k_recent"), k), (cache.storage("v_recent"), v))
            ]
            page, at = cache.place(i, index)
            _code_group(cache, page, at // g, rows[0], rows[1])
        for index in range(max(end, old - cache.sinks, 0), new - cache.sinks):
            cache.storage("k_recent")[i, :, index % window] = k[i, index + cache.sinks - old]
            cache.storage("v_recent")[i, :, index % window] = v[i, index + cache.sinks - old]
