"""The definition: softmax(scale q k^T) v over the visible keys, from a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from vkernels.masks import MaskPlan, VideoMask


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: VideoMask | MaskPlan | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (b s_q n d) in q's dtype, log of the sum of exponentials (b n s_q) in float32, or float64 for float64."""
    inner = torch.promote_types(q.dtype, torch.float32)
    (b, s_q, n, d), (s_k, m) = q.shape, k.shape[1:3]
    grouped = q.to(inner).reshape(b, s_q, m, n // max(m, 1), d)
    score = torch.einsum("bqmgd,bkmd->bmgqk", grouped, k.to(inner)) * scale
    if mask is not None:
        visible = dense(mask, q.device)
        score = score.masked_fill(~visible[:, None, None], -torch.inf)
    top = score.detach().amax(-1, keepdim=True) if s_k else score.new_zeros((*score.shape[:-1], 1))
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(score - top)
    total = p.sum(-1, keepdim=True)
    sees = total > 0
    total = total.masked_fill(~sees, 1.0)
    out = torch.einsum("bmgqk,bkmd->bqmgd", p / total, v.to(inner)).reshape(b, s_q, n, d)
    lse = (top + torch.log(total)).masked_fill(~sees, -torch.inf)
    return out.to(q.dtype), lse.reshape(b, n, s_q)


def dense(mask: VideoMask | MaskPlan, device: torch.device) -> Tensor:
    """Visible pairs in token order: bool [1 or b, s_q, s_k]."""
    if isinstance(mask, VideoMask):
        visible = mask.dense(device)
        return visible if visible.dim() == 3 else visible[None]
    return plan_dense(mask, device)


def plan_dense(plan: MaskPlan, device: torch.device) -> Tensor:
    """What a plan means, read literally. A plan is cut into groups by strides, or mapped by rows, never both."""
    key = torch.arange(plan.len_k, device=device)
    visible = torch.ones((1, plan.len_q, plan.len_k), dtype=torch.bool, device=device)
    if plan.ranges is not None:
        pairs = plan.ranges.unflatten(-1, (-1, 2))[..., None]  # p len_q R 2 1
        visible = ((key >= pairs[..., 0, :]) & (key < pairs[..., 1, :])).any(2)
    if plan.box is not None:
        box = plan.box
        difference = box.k_attr[:, :, None, :] - box.q_attr[:, :, :, None]  # p A len_q len_k
        low = torch.tensor([lo for lo, _ in box.bounds], device=device)[:, None, None]
        high = torch.tensor([hi for _, hi in box.bounds], device=device)[:, None, None]
        inside = ((difference >= low) & (difference <= high)).all(1)
        if box.q_global is not None:
            inside |= box.q_global.bool()[:, :, None]
        if box.k_global is not None:
            inside |= box.k_global.bool()[:, None, :]
        visible = visible & inside
    if plan.q_count is not None:
        visible = visible & (torch.arange(plan.len_q, device=device) < plan.q_count[:, None])[:, :, None]
    if plan.k_count is not None:
        visible = visible & (key < plan.k_count[:, None])[:, None, :]

    p = max(x.shape[0] for x in (visible, plan.q_rows, plan.k_rows) if x is not None)
    q_rows, k_rows = (
        _rows(plan, plan.q_rows, plan.len_q, plan.q_stride),
        _rows(plan, plan.k_rows, plan.len_k, plan.k_stride),
    )
    q_rows, k_rows = q_rows.to(device).expand(p, -1, -1), k_rows.to(device).expand(p, -1, -1)
    tokens = torch.zeros((p, plan.s_q, plan.s_k), dtype=torch.bool, device=device)
    sample = torch.arange(p, device=device)[:, None, None, None]
    groups = visible[:, None].expand(p, plan.groups, -1, -1)
    return tokens.index_put((sample, q_rows[..., None], k_rows[:, :, None]), groups)


def _rows(plan: MaskPlan, rows: Tensor | None, length: int, stride: tuple[int, int]) -> Tensor:
    """Token row of each index: [p, groups, length]."""
    if rows is not None:
        return rows.long()[:, None]
    group, token = torch.arange(plan.groups)[:, None], torch.arange(length)
    return (group * stride[0] + token * stride[1])[None]
