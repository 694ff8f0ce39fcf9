"""The definition: v = taps of the input rows, u = residual + scale * gate * (v + bias), y = norm(u)."""

from __future__ import annotations

import torch

from vkernels.rearrangement.pattern import Affine


def move(x: torch.Tensor, affine: Affine) -> torch.Tensor:
    """An affine plan: split the input axes, permute, expand the repeats, merge."""
    order = sorted(
        (i for i, axis in enumerate(affine.axes) if axis >= 0), key=lambda i: (affine.axes[i], -affine.steps[i], i)
    )
    split = x.reshape([affine.sizes[i] for i in order])
    kept = [i for i, axis in enumerate(affine.axes) if axis >= 0]
    split = split.permute([order.index(i) for i in kept])
    for i, axis in enumerate(affine.axes):
        if axis < 0:
            split = split.unsqueeze(i)
    return split.expand(affine.sizes).reshape(affine.out_shape).clone(memory_format=torch.contiguous_format)


def gather(
    x: list[torch.Tensor],
    ptr: torch.Tensor | None,
    idx: torch.Tensor,
    weight: torch.Tensor | None,
    n_out: int,
    reduce: str,
) -> torch.Tensor:
    """Taps of the rows of all sources: b n_out c, in the dtype of x for a pure move, else at least float32."""
    b = max([s.shape[0] for s in x] + [idx.shape[0]])
    rows = torch.cat([s.flatten(1, -2).expand(b, -1, -1) for s in x], 1)  # b n c
    rows = torch.cat([rows, rows.new_zeros(b, 1, rows.shape[-1])], 1)  # row -1 is nothing
    idx = idx.long().expand(b, -1)
    at = torch.arange(b, device=idx.device)[:, None]
    taps = rows[at, idx]  # b nnz c
    if ptr is None and weight is None:
        return taps
    inner = torch.promote_types(rows.dtype, torch.float32)
    taps = taps.to(inner)
    if weight is not None:
        taps = taps * weight.expand(b, -1)[..., None].to(inner)
    if ptr is None:
        return taps
    tap = torch.arange(idx.shape[1], dtype=torch.int32, device=idx.device).expand(ptr.shape[0], -1).contiguous()
    row = torch.searchsorted(ptr[:, 1:].contiguous(), tap, right=True).expand(b, -1)  # n_out: belongs to no row
    out = taps.new_zeros(b, n_out + 1, taps.shape[-1])
    if reduce == "sum":
        return out.index_put((at, row), taps, accumulate=True)[:, :n_out]
    return out.scatter_reduce(1, row[..., None].expand_as(taps), taps, "amax", include_self=False)[:, :n_out]


def epilogue(
    v: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: str | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, u) in at least float32."""
    inner = torch.promote_types(v.dtype, torch.float32)
    u = v.to(inner)
    if bias is not None:
        u = u + bias.to(inner)
    if gate is not None:
        u = u * gate.to(inner)
    u = u * scale
    if residual is not None:
        u = u + residual.to(inner)
    y = u
    if norm == "layer":
        y = u - u.mean(-1, keepdim=True)
    if norm is not None:
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
        if norm_weight is not None:
            y = y * norm_weight.to(inner)
        if norm_bias is not None:
            y = y + norm_bias.to(inner)
    return y, u
