"""torch's scaled_dot_product_attention by signature, on these kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from vkernels.check import ShapeError, refusal, require
from vkernels.compat import intervals
from vkernels.compat.intervals import Band
from vkernels.masks import MaskPlan, VideoMask
from vkernels.ops.attention import attention

OP = "sdpa"


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | VideoMask | MaskPlan | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, argument for argument; causal is aligned to the top left, as torch has it.

    Args:
        query:      (b n s_q d) or (n s_q d)
        key, value: (b m s_k d) or (m s_k d); m = n, or with enable_gqa a divisor of n
        attn_mask:  a VideoMask or MaskPlan; or a tensor that broadcasts to (b 1 s_q s_k): bool (True is seen) or an
                    additive mask of zeros and lowest values. A tensor is read once, which waits for the device, and
                    may show each query up to 3 runs of keys; a VideoMask has neither limit
        dropout_p:  0
        is_causal:  query i sees keys up to i; not together with attn_mask
        scale:      None: 1 / sqrt(d)
        enable_gqa: each key head serves n / m query heads in a row
    Returns:
        like query, contiguous as (b s_q n d) in memory
    Raises:
        ShapeError, TypeError, ValueError; NotImplementedError for dropout and biases that are no masks
    Gradients: query, key, value.   Deterministic: yes. A query that sees nothing gives 0 (torch: NaN or 0).
    Example:
        >>> sdpa(q, k, v, is_causal=True).shape
        torch.Size([1, 8, 128, 64])
    Source: torch.nn.functional.scaled_dot_product_attention.
    """
    require(dropout_p == 0.0, OP, "dropout_p", "be 0, there is no dropout kernel", dropout_p, NotImplementedError)
    rank = query.dim()
    if rank not in (3, 4) or key.dim() != rank or value.dim() != rank:
        got = f"ranks {query.dim()}, {key.dim()} and {value.dim()}"
        raise ShapeError(refusal(OP, "query, key and value", "have shape (b n s d) or (n s d)", got))
    q, k, v = (x if rank == 4 else x[None] for x in (query, key, value))
    same = q.shape[1] == k.shape[1]
    require(same or enable_gqa, OP, "key", f"have the {q.shape[1]} heads of query without enable_gqa", k.shape[1])
    require(not (is_causal and attn_mask is not None), OP, "attn_mask", "be None with is_causal", "both")
    s_q, s_k = q.shape[2], k.shape[2]
    mask: VideoMask | MaskPlan | None
    if is_causal:
        mask = intervals.uniform(s_q, s_k, Band(right=0, bottom_right=False), q.device)
    elif isinstance(attn_mask, Tensor):
        mask = _plan_of(attn_mask, q.shape[0], s_q, s_k)
    else:
        mask = attn_mask
    out = attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask, scale=scale)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2) if rank == 4 else out.transpose(1, 2)[0]


def _plan_of(mask: Tensor, b: int, s_q: int, s_k: int) -> MaskPlan:
    if mask.dtype != torch.bool:
        seen = mask == 0
        lowest = mask <= torch.finfo(mask.dtype).min / 2
        only = bool((seen | lowest).all())
        rule = "be a mask: bool, or zeros and lowest values; there is no kernel for additive biases"
        require(only, OP, "attn_mask", rule, f"{mask.dtype} with other values", NotImplementedError)
        mask = seen
    while mask.dim() < 4:
        mask = mask[None]
    fits = mask.dim() == 4 and all(a in (1, e) for a, e in zip(mask.shape, (b, 1, s_q, s_k), strict=True))
    if not fits:
        rule = f"broadcast to (b 1 s_q s_k) = {(b, 1, s_q, s_k)}, one mask for all heads"
        raise ShapeError(refusal(OP, "attn_mask", rule, tuple(mask.shape)))
    return intervals.runs(mask[:, 0].expand(-1, s_q, s_k), OP)
