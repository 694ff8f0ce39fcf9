"""The definition: attention of the newest tokens over what the cache holds, decoded."""

from __future__ import annotations

import torch

from vkernels.kv_cache import KVCache
from vkernels.ops.kv_append.reference import unpack


def _group(cache: KVCache, page: int, at: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (g m d) of one coded group: delta * code + zero."""
    g, d, bits = cache.group, cache.d, cache.bits
    delta, zero = cache.storage("k_scale")[page, :, at].to(dtype).unbind(1)  # m d
    k = unpack(cache.storage("k_codes")[page, :, at], bits, d).to(dtype) * delta[..., None] + zero[..., None]  # m d g
    scale = cache.storage("v_scale")[page, :, at].to(dtype)
    delta, zero = scale.transpose(2, 3).repeat_interleave(g, 3)[..., :d].unbind(1)
    v = unpack(cache.storage("v_codes")[page, :, at], bits, g)[..., :d].to(dtype) * delta + zero  # m g d
    return k.permute(2, 0, 1), v.transpose(0, 1)


def dequantised(cache: KVCache, sequence: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (s m d) of one sequence, in the order of `cache.positions(sequence)`."""
    length, inner = cache.length(sequence), torch.promote_types(dtype, torch.float32)
    first, end = cache.layout.history(length)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    if cache.sinks:
        held = slice(0, min(length, cache.sinks))
        k_sink, v_sink = cache.storage("k_sink")[sequence, :, held], cache.storage("v_sink")[sequence, :, held]
        parts.append((k_sink.transpose(0, 1), v_sink.transpose(0, 1)))
    places = [cache.place(sequence, index) for index in range(first, end, cache.group)]
    if cache.bits:
        parts += [_group(cache, page, at // cache.group, inner) for page, at in places]
        index = torch.arange(end, max(length - cache.sinks, 0), device=cache.device) % (cache.residual + cache.group)
        k_recent, v_recent = (
            cache.storage("k_recent")[sequence, :, index],
            cache.storage("v_recent")[sequence, :, index],
        )
        parts.append((k_recent.transpose(0, 1), v_recent.transpose(0, 1)))
    elif places:
        page, at = torch.tensor(places, device=cache.device).unbind(1)
        parts.append((cache.storage("k_rows")[page, :, at], cache.storage("v_rows")[page, :, at]))
    empty = torch.zeros(0, cache.m, cache.d, dtype=inner, device=cache.device)
    k, v = (torch.cat([empty, *(p[i].to(inner) for p in parts)]).to(dtype) for i in (0, 1))
    return k, v


def decode_attention(
    q: torch.Tensor, cache: KVCache, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    inner = torch.promote_types(q.dtype, torch.float32)
    b, s, n, _ = q.shape
    outputs, lses = [], []
    for i in range(b):
        k, v = (t.repeat_interleave(n // cache.m, 1) for t in dequantised(cache, i, inner))  # keys n d
        at_k = torch.tensor(cache.positions(i), device=q.device, dtype=torch.int64)
        at_q = torch.arange(cache.length(i) - s, cache.length(i), device=q.device)[:, None]
        visible = at_k <= at_q  # s keys
        if window is not None:
            visible &= at_k > at_q - window
        scores = torch.einsum("snd,knd->nsk", q[i].to(inner).contiguous(), k) * scale
        scores = scores.masked_fill(~visible, float("-inf"))
        lse = torch.logsumexp(scores, -1) if len(at_k) else scores.new_full((n, s), float("-inf"))
        p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])
        v = v.masked_fill(~visible.any(0)[:, None, None], 0)
        outputs.append(torch.einsum("nsk,knd->snd", p, v))
        lses.append(lse)
    lse = torch.stack(lses) if b else q.new_zeros(0, n, s, dtype=inner)
    o = torch.stack(outputs) if b else q.new_zeros(q.shape)
    return o.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))
