"""flash_attn.flash_attn_interface: dense and variable-length attention, the arguments those of flash-attn 2.8."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vkernels.check import bind, require
from vkernels.compat import intervals
from vkernels.compat.flash_attn.arguments import band, check_starts, refuse_unsupported
from vkernels.compat.flash_attn.kvcache import flash_attn_with_kvcache, paged_rows
from vkernels.compat.intervals import Band
from vkernels.masks import MaskPlan
from vkernels.ops.attention import attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of a padded batch; causal and windows are aligned to the bottom right.

    Args:
        q, k, v:           (b s_q n d), (b s_k m d), (b s_k m d), n a multiple of m
        dropout_p:         0
        softmax_scale:     None: 1 / sqrt(d)
        causal:            query i sees keys up to i + s_k - s_q
        window_size:       (left, right) of that place, inclusive; -1: no limit
        softcap:           0
        alibi_slopes:      None
        deterministic:     accepted; every kernel here is
        return_attn_probs: return (out, softmax_lse (b n s_q), None): probabilities exist only for dropout's tests
    Returns:
        out (b s_q n d)
    Raises:
        ShapeError, TypeError, ValueError; NotImplementedError for dropout, softcap, ALiBi
    Gradients: q, k, v, through the output and through lse.   Deterministic: yes.
    Example:
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([1, 128, 8, 64])
    Source: flash-attn 2.8.
    """
    op = "flash_attn_func"
    bind(op, ("q", q, "b s_q n d"), ("k", k, "b s_k m d"), ("v", v, "b s_k m d"))
    refuse_unsupported(op, dropout_p, softcap, alibi_slopes)
    return _dense(op, q, k, v, softmax_scale, causal, window_size, return_attn_probs)


def _dense(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    with_lse: bool,
) -> Any:
    mask = intervals.uniform(q.shape[1], k.shape[1], band(op, causal, window_size), q.device)
    return _answer(q, k, v, mask, scale, with_lse)


def _answer(q: Tensor, k: Tensor, v: Tensor, mask: MaskPlan | None, scale: float | None, with_lse: bool) -> Any:
    out = attention(q, k, v, mask=mask, scale=scale, return_lse=with_lse)
    return (*out, None) if with_lse else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (b s 3 n d): views, nothing is copied."""
    op = "flash_attn_qkvpacked_func"
    bind(op, ("qkv", qkv, "b s 3 n d"))
    refuse_unsupported(op, dropout_p, softcap, alibi_slopes)
    q, k, v = qkv.unbind(2)
    return _dense(op, q, k, v, softmax_scale, causal, window_size, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q (b s_q n d) and kv (b s_k 2 m d): views, nothing is copied."""
    op = "flash_attn_kvpacked_func"
    bind(op, ("q", q, "b s_q n d"), ("kv", kv, "b s_k 2 m d"))
    refuse_unsupported(op, dropout_p, softcap, alibi_slopes)
    k, v = kv.unbind(2)
    return _dense(op, q, k, v, softmax_scale, causal, window_size, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention within sequences laid end to end: one call, one launch, whatever their number and lengths.

    Args:
        q, k, v:          (tokens_q n d), (tokens_k m d), (tokens_k m d)
        cu_seqlens_q, _k: int32 (b + 1) on q's device: 0, then where each sequence ends
        max_seqlen_q, _k: the longest sequence; needed only with block_table, since lengths are read on the device
        block_table:      int32 (b blocks): k and v are pages (pages page m d), whose rows are gathered first
        the others:       as flash_attn_func
    Returns:
        out (tokens_q n d); with return_attn_probs (out, softmax_lse (n tokens_q), None)
    Raises:
        as flash_attn_func; cu_seqlens that decrease or leave the tokens are refused on the CPU and see nothing on a GPU
    Gradients: q, k, v.   Deterministic: yes.
    Example:
        >>> flash_attn_varlen_func(q, k, v, cu, cu, 96, 96, causal=True).shape
        torch.Size([160, 8, 64])
    Source: flash-attn 2.8.
    """
    op = "flash_attn_varlen_func"
    refuse_unsupported(op, dropout_p, softcap, alibi_slopes)
    limits = band(op, causal, window_size)
    if block_table is None:
        bind(op, ("q", q, "tokens_q n d"), ("k", k, "tokens_k m d"), ("v", v, "tokens_k m d"))
        return _varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, limits, softmax_scale, return_attn_probs)
    bind(op, ("q", q, "tokens_q n d"))
    _check_queries(op, q, cu_seqlens_q, cu_seqlens_k)
    k, v = (paged_rows(op, x, block_table, max_seqlen_k).flatten(0, 1) for x in (k, v))
    start_k = torch.arange(len(block_table), device=k.device) * (k.shape[0] // max(len(block_table), 1))
    mask = intervals.packed(cu_seqlens_q, start_k, cu_seqlens_k.diff(), q.shape[0], k.shape[0], limits)
    return _flat_answer(q, k, v, mask, softmax_scale, return_attn_probs)


def _check_queries(op: str, q: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    check_starts(op, "cu_seqlens_q", cu_q, q.shape[0])
    require(cu_q.shape == cu_k.shape, op, "cu_seqlens_k", f"have {len(cu_q)} entries like cu_seqlens_q", len(cu_k))


def _varlen(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    limits: Band,
    scale: float | None,
    with_lse: bool,
) -> Any:
    _check_queries(op, q, cu_q, cu_k)
    check_starts(op, "cu_seqlens_k", cu_k, k.shape[0])
    return _flat_answer(q, k, v, _varlen_plan(cu_q, cu_k, q.shape[0], k.shape[0], limits), scale, with_lse)


def _flat_answer(q: Tensor, k: Tensor, v: Tensor, mask: MaskPlan, scale: float | None, with_lse: bool) -> Any:
    out = _answer(q[None], k[None], v[None], mask, scale, with_lse)
    return (out[0][0], out[1][0], None) if with_lse else out[0]


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the layers of a model share their cu_seqlens, and so their plan


def _varlen_plan(cu_q: Tensor, cu_k: Tensor, s_q: int, s_k: int, limits: Band) -> MaskPlan:
    if len(cu_q) < 2:
        nothing = torch.zeros((1, s_q), dtype=torch.int32, device=cu_q.device)
        return intervals.plan(nothing, nothing, s_k)
    if torch.compiler.is_compiling() or cu_q.is_inference() or cu_k.is_inference():  # these count no versions
        return intervals.packed(cu_q, cu_k, cu_k.diff(), s_q, s_k, limits)
    key = (id(cu_k), cu_q._version, cu_k._version, s_q, s_k, limits)
    known = _plans.get(cu_q)
    if known is None or known[0] != key or known[1]() is not cu_k:
        made = intervals.packed(cu_q, cu_k, cu_k.diff(), s_q, s_k, limits)
        known = _plans[cu_q] = (key, weakref.ref(cu_k), made)
    return known[2]


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (tokens 3 n d): views, nothing is copied."""
    op = "flash_attn_varlen_qkvpacked_func"
    bind(op, ("qkv", qkv, "tokens 3 n d"))
    check_starts(op, "cu_seqlens", cu_seqlens, qkv.shape[0])
    refuse_unsupported(op, dropout_p, softcap, alibi_slopes)
    q, k, v = qkv.unbind(1)
    limits = band(op, causal, window_size)
    return _varlen(op, q, k, v, cu_seqlens, cu_seqlens, limits, softmax_scale, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q (tokens_q n d) and kv (tokens_k 2 m d): views, nothing is copied."""
    op = "flash_attn_varlen_kvpacked_func"
    bind(op, ("q", q, "tokens_q n d"), ("kv", kv, "tokens_k 2 m d"))
    refuse_unsupported(op, dropout_p, softcap, alibi_slopes)
    k, v = kv.unbind(1)
    limits = band(op, causal, window_size)
    return _varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, limits, softmax_scale, return_attn_probs)
