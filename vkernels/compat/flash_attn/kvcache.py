"""flash_attn_with_kvcache: rotate, write and attend to a cache the caller owns, padded or paged.

The library's own `KVCache` and `decode_attention` split one query over many keys and read 8, 4 or 2 bit codes; this
function serves code that already lives with flash-attn's layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.check import ShapeError, bind, refusal, require, same_dtype
from vkernels.compat import intervals
from vkernels.compat.flash_attn.arguments import band, refuse_unsupported
from vkernels.compat.flash_attn.layers.rotary import places, rotate
from vkernels.ops.attention import attention

OP = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attend to a cache, first writing new keys and values into it, in place.

    Args:
        q:                     (b s_q n d)
        k_cache, v_cache:      (b_cache s_cache m d), or pages (pages page m d) with block_table
        k, v:                  (b s_new m d), written after the cached tokens
        rotary_cos, _sin:      (positions r): q and k are rotated first. Keys stand at their place in the cache; queries
                               too if causal or windowed, else all of them at the cache's end
        cache_seqlens:         tokens already cached, int or (b); None without k: all of s_cache
        cache_batch_idx:       (b): which sequence of the cache each sample is; gathers those sequences
        cache_leftpad:         (b): the first token of each sequence that counts
        block_table:           int32 (b blocks): the pages of each sequence; gathers them
        softmax_scale, causal, window_size, softcap, alibi_slopes: as flash_attn_func
        rotary_interleaved:    pairs (0, 1), (2, 3)...; False: (0, r), (1, r + 1)...
        num_splits:            accepted; the backend decides
        return_softmax_lse:    return (out, lse (b n s_q))
    Returns:
        out (b s_q n d)
    Raises:
        ShapeError, TypeError, ValueError; NotImplementedError for softcap and ALiBi. Lengths past the cache are
        refused on the CPU; on a GPU torch stops the write.
    Gradients: none.   Deterministic: yes, where cache_batch_idx names no sequence twice.
    Example:
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True).shape
        torch.Size([2, 1, 8, 64])
    Source: flash-attn 2.8.
    """
    refuse_unsupported(OP, softcap=softcap, alibi_slopes=alibi_slopes)
    limits = band(OP, causal, window_size)
    b, s_q = bind(OP, ("q", q, "b s n d"))["b"], q.shape[1]
    bind(OP, ("k_cache", k_cache, "rows s_cache m d"), ("v_cache", v_cache, "rows s_cache m d"))
    same_dtype(OP, ("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v))
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, k, v))
    require(not gradient, OP, "q, k and v", "not require a gradient, a cache is for inference", "requires_grad=True")
    length = _lengths(cache_seqlens, k_cache, k, block_table, b)
    if rotary_cos is not None:
        if k is None or rotary_sin is None:
            raise ValueError(refusal(OP, "rotary_cos", "come with rotary_sin, k and v", "rotary_cos without them"))
        begin = length if cache_leftpad is None else length - cache_leftpad.long()
        still = limits.everything  # then every query stands at the cache's end
        q = rotate(q, rotary_cos, rotary_sin, places(begin, s_q, still), rotary_interleaved, op=OP)
        k = rotate(k, rotary_cos, rotary_sin, places(begin, k.shape[1]), rotary_interleaved, op=OP)
    if k is not None:
        bind(OP, ("k", k, f"{b} s_new {k_cache.shape[2]} {k_cache.shape[3]}"), ("v", v, "b s_new m d"))
        _write(k_cache, v_cache, k, v, length, cache_batch_idx, block_table)
        length = length + k.shape[1]
    if block_table is not None:
        k_all, v_all = (paged_rows(OP, x, block_table, None) for x in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        k_all, v_all = k_cache[cache_batch_idx.long()], v_cache[cache_batch_idx.long()]
    else:
        k_all, v_all = k_cache[:b], v_cache[:b]
    first = 0 if cache_leftpad is None else cache_leftpad
    mask = intervals.by_length(s_q, first, length, k_all.shape[1], limits)
    return attention(q, k_all, v_all, mask=mask, scale=softmax_scale, return_lse=return_softmax_lse)


def _lengths(given: int | Tensor | None, cache: Tensor, k: Tensor | None, table: Tensor | None, b: int) -> Tensor:
    """Tokens each sample holds before the new ones, int64 (b)."""
    room = cache.shape[1] * (1 if table is None else table.shape[1])
    new = 0 if k is None else k.shape[1]
    if given is None:
        require(k is None, OP, "cache_seqlens", "be given with k, to say where it goes", None)
        given = room
    if isinstance(given, int):
        given = torch.full((b,), given, dtype=torch.int32, device=cache.device)
    if tuple(given.shape) != (b,):
        raise ShapeError(refusal(OP, "cache_seqlens", f"have shape ({b})", tuple(given.shape)))
    if given.device.type == "cpu" and given.numel() and not torch.compiler.is_compiling():
        fits = int(given.min()) >= 0 and int(given.max()) + new <= room
        require(fits, OP, "cache_seqlens", f"leave room for {new} new tokens in {room}", given.tolist()[:8])
    return given.long()


def _write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor | None,
    length: Tensor,
    batch_idx: Tensor | None,
    table: Tensor | None,
) -> None:
    require(v is not None, OP, "v", "come with k", None)
    at = length[:, None] + torch.arange(k.shape[1], device=k.device)  # b s_new
    if table is None:
        row = torch.arange(len(length), device=k.device) if batch_idx is None else batch_idx.long()
        row = row[:, None].expand_as(at)
    else:
        page = k_cache.shape[1]
        row, at = table.long().gather(1, at // page), at % page
    k_cache[row, at], v_cache[row, at] = k, v  # type: ignore[assignment]


def paged_rows(op: str, pages: Tensor, table: Tensor, longest: int | None) -> Tensor:
    """The pages of each sequence in a row: (b blocks*page m d). Entries without a page are never seen: any will do."""
    bind(op, ("block_table", table, "b blocks"), ("pages", pages, "pages page m d"))
    if longest is not None:
        table = table[:, : -(-longest // pages.shape[1])]
    return pages[table.long().clamp(0, pages.shape[0] - 1)].flatten(1, 2)
