"""Attention over disjoint sets of keys, made one: softmax weights of the parts are the exponentials of their lse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vkernels.check import ShapeError, refusal, require


def merge_attentions(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """What attention over all keys gives, from attention over each part of them.

    Args:
        outs: p outputs (b s n d), or one tensor (p b s n d)
        lses: p logarithms of the sums of exponentials (b n s), float32 or float64, or one tensor (p b n s); -inf where
              the part shows a query nothing
    Returns:
        output (b s n d) in the dtype of the outputs, merged in that of the lses; lse (b n s). A query that no part
        shows anything gets output 0 and lse -inf.
    Raises:
        ShapeError, ValueError
    Gradients: outs and lses, through both results; 0 where nothing is seen.   Deterministic: yes.
    Example:
        >>> near, far = (attention(q, k, v, mask=mask, return_lse=True) for mask in masks)
        >>> o, lse = merge_attentions([near[0], far[0]], [near[1], far[1]])
    Source: xformers' merge_attentions; the identity is that of online softmax, arXiv:1805.02867.
    """
    op = "merge_attentions"
    outs, lses = tuple(outs), tuple(lses)
    require(len(outs) > 0, op, "outs", "hold at least one part", len(outs))
    require(len(outs) == len(lses), op, "lses", f"hold {len(outs)} parts like outs", len(lses))
    shape = outs[0].shape
    require(len(shape) == 4, op, "outs", "hold tensors (b s n d)", tuple(shape))
    b, s, n, _ = shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != shape:
            raise ShapeError(refusal(op, "outs", f"all have shape {tuple(shape)}", tuple(out.shape)))
        if tuple(lse.shape) != (b, n, s):
            raise ShapeError(refusal(op, "lses", f"have shape (b n s) = {(b, n, s)}", tuple(lse.shape)))
    score = torch.stack(lses)  # p b n s
    top = score.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = torch.exp(score - top)
    total = weight.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    share = (weight / total).transpose(2, 3)[..., None]  # p b s n 1
    merged = torch.zeros((), dtype=score.dtype, device=score.device)
    for part, out in zip(share, outs, strict=True):
        # a part that shows nothing may hold anything: its output is not read
        merged = merged + part * out.to(score.dtype).masked_fill(part == 0, 0.0)
    lse = (top + torch.log(total)).masked_fill(nothing, -torch.inf)
    return merged.to(outs[0].dtype), lse
