"""Tokens from one order to the other: everyone's, in the mask's order, and each rank's own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vkernels.check import ShapeError, refusal, require
from vkernels.distributed.exchange import agree, all_gather, all_to_all, fingerprint, group_of, size_and_rank
from vkernels.distributed.shards import Mask, ShardPlan, plan_shards


@lru_cache(maxsize=16)
def _dealt(mask: Mask, world: int) -> ShardPlan:
    return plan_shards(mask, world)


def shards_of(mask: Mask | ShardPlan, world: int, op: str) -> ShardPlan:
    """The deal of a mask, remembered; a ShardPlan is itself."""
    if isinstance(mask, ShardPlan):
        require(mask.world == world, op, "mask", f"be dealt to the {world} ranks of mesh", mask.world)
        return mask
    return _dealt(mask, world)


@torch.compiler.disable
def scatter_tokens(x: Tensor, mask: Mask | ShardPlan, mesh: Any = None, *, dim: int = 1) -> Tensor:
    """This rank's tokens of x, which every rank holds whole: embeddings, positions, labels.

    Args:
        x:    any tensor whose `dim` is the mask's tokens, the same on every rank
        mask: a VideoMask, MaskPlan, number of tokens, or ShardPlan
        mesh: a one-dimensional DeviceMesh or a ProcessGroup; None: everyone
        dim:  of the tokens
    Returns:
        the rows `plan_shards(mask, world).tokens[rank]`
    Gradients: x, whole on every rank.
    """
    op = "scatter_tokens"
    group = group_of(mesh, op)
    world, me = size_and_rank(group)
    shards = shards_of(mask, world, op)
    s = shards.flat.tokens
    if x.shape[dim] != s:
        raise ShapeError(refusal(op, "x", f"have the mask's {s} tokens in dimension {dim}", tuple(x.shape)))
    return _Scatter.apply(x, shards, group, me, dim)  # type: ignore[no-any-return]


@torch.compiler.disable
def gather_tokens(x: Tensor, mask: Mask | ShardPlan, mesh: Any = None, *, dim: int = 1) -> Tensor:
    """Everyone's tokens in the mask's order, from each rank's own: `scatter_tokens` undone, on every rank.

    Args: as scatter_tokens, x holding this rank's tokens
    Gradients: x, this rank's part of what each rank's result contributes, summed over the ranks.
    """
    op = "gather_tokens"
    group = group_of(mesh, op)
    world, me = size_and_rank(group)
    problem: Exception | None = None
    digest = 0
    try:
        shards = shards_of(mask, world, op)
        own = len(shards.tokens[me])
        if x.shape[dim] != own:
            raise ShapeError(refusal(op, "x", f"have rank {me}'s {own} tokens in dimension {dim}", tuple(x.shape)))
        digest = fingerprint(shards.digest, x.movedim(dim, 0).shape[1:], x.dtype, dim)
    except (ValueError, TypeError) as error:
        problem = error
    agree(op, digest, problem, group, x.device)
    return _Gather.apply(x, shards, group, me, dim)  # type: ignore[no-any-return]


def _collect(x: Tensor, shards: ShardPlan, group: Any, dim: int) -> Tensor:
    counts = [len(rows) for rows in shards.tokens]
    parts = all_gather(x.movedim(dim, 0).contiguous(), counts, group)
    whole = torch.cat(parts)
    out = torch.empty_like(whole)
    out[shards.order.to(x.device)] = whole
    return out.movedim(0, dim)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ShardPlan, group: Any, me: int, dim: int) -> Tensor:
        ctx.shards, ctx.group, ctx.dim = shards, group, dim
        return x.index_select(dim, shards.tokens[me].to(x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _collect(grad, ctx.shards, ctx.group, ctx.dim), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ShardPlan, group: Any, me: int, dim: int) -> Tensor:
        ctx.shards, ctx.group, ctx.dim, ctx.me = shards, group, dim, me
        return _collect(x, shards, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, shards = grad.movedim(ctx.dim, 0), ctx.shards
        parts = [rows.index_select(0, tokens.to(grad.device)) for tokens in shards.tokens]
        back = all_to_all(parts, [len(shards.tokens[ctx.me])] * shards.world, ctx.group)
        total = torch.stack(back).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        return total.movedim(0, ctx.dim), None, None, None, None
