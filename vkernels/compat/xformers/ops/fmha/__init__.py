"""xformers.ops.fmha: attention of BMK, BMHK and BMGHK tensors under a bias that is a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vkernels.check import ShapeError, refusal, require
from vkernels.compat.xformers.ops.fmha import attn_bias
from vkernels.compat.xformers.ops.fmha.attn_bias import AttentionBias, BlockDiagonalMask, LowerTriangularMask
from vkernels.compat.xformers.ops.fmha.plans import OP, plan_of, served, unpaged
from vkernels.merge import merge_attentions as merge_parts
from vkernels.ops.attention import attention

__all__ = [
    "AttentionBias",
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "attn_bias",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, p: float, scale: float | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    require(p == 0.0, OP, "p", "be 0, there is no dropout kernel", p, NotImplementedError)
    given = query.dtype if dtype is None else dtype
    require(given == query.dtype, OP, "output_dtype", f"be the dtype of query ({query.dtype})", given)
    rank = query.dim()
    if rank not in (3, 4, 5) or key.dim() != rank or value.dim() != rank:
        got = f"{query.dim()}, {key.dim()} and {value.dim()}"
        raise ShapeError(refusal(OP, "query, key and value", "have one rank: BMK, BMHK or BMGHK", f"ranks {got}"))
    if bias is not None:
        served(bias)
    q, k, v = _heads(query, key, value)
    if hasattr(bias, "q_seqinfo"):
        require(q.shape[0] == 1, OP, "query", "have batch 1 where attn_bias holds the sequences", q.shape[0])
        k, v = unpaged(bias, k, v)
    mask = plan_of(bias, q.shape[1], k.shape[1], q.device)
    out, lse = attention(q, k, v, mask=mask, scale=scale, return_lse=True)
    if rank == 5:
        lse = lse.unflatten(1, tuple(query.shape[2:4]))
    return out.view(query.shape), lse


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b s n d) of each layout. Keys that BMGHK expands over a group's heads are taken once."""
    if query.dim() == 3:
        return query[:, :, None], key[:, :, None], value[:, :, None]
    if query.dim() == 4:
        return query, key, value
    k, v = key, value
    once = key.shape[3] == 1 or (key.stride(3) == 0 and value.stride(3) == 0)
    if once:
        k, v = key[:, :, :, :1], value[:, :, :, :1]
    return query.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale * query key^T + attn_bias) value, where attn_bias is a mask.

    Args:
        query:        (b s_q k), (b s_q h k) or (b s_q g h k)
        key, value:   same rank; in BMGHK a group's keys may be expanded over its heads and are then read once
        attn_bias:    an AttentionBias of `attn_bias` here or of xformers itself, or None; additive biases are refused
        p:            0
        scale:        None: 1 / sqrt(k)
        op:           accepted; the backend is chosen by the library
        output_dtype: None or the dtype of query
    Returns:
        as query
    Raises:
        ShapeError, TypeError, ValueError; NotImplementedError for dropout and additive biases
    Gradients: query, key, value.   Deterministic: yes.
    Example:
        >>> bias = attn_bias.BlockDiagonalCausalMask.from_seqlens([5, 3])
        >>> memory_efficient_attention(q, k, v, bias).shape
        torch.Size([1, 8, 4, 64])
    Source: xformers 0.0.35.
    """
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward(*args: Any, **kwargs: Any) -> Tensor:
    """`memory_efficient_attention`."""
    return memory_efficient_attention(*args, **kwargs)


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`memory_efficient_attention` and its lse (b h s_q) or (b g h s_q), float32."""
    return _attend(query, key, value, attn_bias, p, scale, output_dtype)


memory_efficient_attention_partial = memory_efficient_attention_forward_requires_grad


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over all keys from attention over disjoint parts, with gradients; `vkernels.merge_attentions` in BMHK
    and BMGHK.

    Args:
        attn_split:   parts (b s h k) or (b s g h k), as a list or one tensor with a leading axis
        lse_split:    (b h s) or (b g h s)
        write_lse:    also return the lse
        output_dtype: None: that of the parts
    Returns:
        (output, lse or None)
    """
    outs, lses = list(attn_split), list(lse_split)
    grouped = bool(outs) and outs[0].dim() == 5
    shape = outs[0].shape if outs else None
    if grouped:
        outs, lses = [o.flatten(2, 3) for o in outs], [x.flatten(1, 2) for x in lses]
    out, lse = merge_parts(outs, lses)
    if grouped:
        assert shape is not None
        out, lse = out.view(shape), lse.unflatten(1, tuple(shape[2:4]))
    return (out if output_dtype is None else out.to(output_dtype)), (lse if write_lse else None)
