"""Tokens from one order to the other: everyone's, in the mask's order, and each rank's own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vkernels.check import ShapeError, refusal, require
from vkernels.distributed.exchange import (
    Told,
    agree,
    all_gather,
    all_to_all,
    fingerprint,
    group_of,
    refused,
    size_and_rank,
)
from vkernels.distributed.shards import Mask, ShardPlan, plan_shards
from vkernels.named import like, look, meant, named


@lru_cache(maxsize=16)
def _dealt(mask: Mask, world: int) -> ShardPlan:
    return plan_shards(mask, world)


def shards_of(mask: Mask | ShardPlan, world: int, op: str) -> ShardPlan:
    """The deal of a mask, remembered; a ShardPlan is itself."""
    if isinstance(mask, ShardPlan):
        require(mask.world == world, op, "mask", f"be dealt to the {world} ranks of mesh", mask.world)
        return mask
    return _dealt(mask, world)


class _Route(NamedTuple):
    """Where rows are, on their device."""

    own: Tensor  # this rank's, in the whole
    order: Tensor  # rows of the whole: rank 0's, then rank 1's
    place: Tensor  # of each row of the whole, among the rows of every rank padded to the most
    counts: tuple[int, ...]


@torch.inference_mode(False)
def _made(shards: ShardPlan, me: int, device: torch.device) -> _Route:
    counts = tuple(map(len, shards.tokens))
    most, place = max(counts), torch.empty_like(shards.order)
    for r, rows in enumerate(shards.tokens):
        place[rows] = torch.arange(r * most, r * most + len(rows))
    return _Route(shards.tokens[me].to(device), shards.order.to(device), place.to(device), counts)


@torch.compiler.assume_constant_result
def _route(mask: Any, world: int, me: int, device: torch.device, op: str) -> _Route:
    shards = shards_of(meant(mask), world, op)
    if (me, device) not in shards.seats:
        shards.seats[me, device] = _made(shards, me, device)
    return shards.seats[me, device]  # type: ignore[no-any-return]


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
    route = _route(named(mask), world, me, x.device, op)
    s = len(route.order)
    if x.shape[dim] != s:
        raise ShapeError(refusal(op, "x", f"have the mask's {s} tokens in dimension {dim}", tuple(x.shape)))
    return _Scatter.apply(x, route, group, dim)  # type: ignore[no-any-return]


def gather_tokens(x: Tensor, mask: Mask | ShardPlan, mesh: Any = None, *, dim: int = 1) -> Tensor:
    """Everyone's tokens in the mask's order, from each rank's own: `scatter_tokens` undone, on every rank.

    Args: as scatter_tokens, x holding this rank's tokens
    Gradients: x, this rank's part of what each rank's result contributes, summed over the ranks.
    """
    op = "gather_tokens"
    group = group_of(mesh, op)
    world, me = size_and_rank(group)
    told, s = _gathering(named(mask), world, me, look(x), named(dim))
    if told.kind:
        return agree(op, told, group, x.new_empty((*x.shape[:dim], s, *x.shape[dim + 1 :])))[0]
    (x,) = agree(op, told, group, x)
    return _Gather.apply(x, _route(named(mask), world, me, x.device, op), group, dim)  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result
def _gathering(mask: Any, world: int, me: int, x: Any, dim: int) -> tuple[Told, int]:
    """What to tell the others, and the tokens of the mask."""
    op, x, s = "gather_tokens", like(x), 0
    try:
        shards = shards_of(meant(mask), world, op)
        s, own = shards.flat.tokens, len(shards.tokens[me])
        if x.shape[dim] != own:
            raise ShapeError(refusal(op, "x", f"have rank {me}'s {own} tokens in dimension {dim}", tuple(x.shape)))
        return fingerprint(shards.digest, x.movedim(dim, 0).shape[1:], x.dtype, dim), s
    except (ValueError, TypeError) as error:
        return refused(error), s


def _collect(x: Tensor, route: _Route, group: Any, dim: int) -> Tensor:
    everyone = all_gather(x.movedim(dim, 0).contiguous(), max(route.counts), group)
    return everyone.flatten(0, 1).index_select(0, route.place).movedim(0, dim)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route, group: Any, dim: int) -> Tensor:  # type: ignore[override]
        ctx.route, ctx.group, ctx.dim = route, group, dim
        return x.index_select(dim, route.own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _collect(grad, ctx.route, ctx.group, ctx.dim), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route, group: Any, dim: int) -> Tensor:  # type: ignore[override]
        ctx.route, ctx.group, ctx.dim = route, group, dim
        return _collect(x, route, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        route, world = ctx.route, len(ctx.route.counts)
        own = len(route.own)
        parts = grad.movedim(ctx.dim, 0).index_select(0, route.order)
        back = all_to_all(parts, route.counts, (own,) * world, ctx.group).unflatten(0, (world, own))
        total = back.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        return total.movedim(0, ctx.dim), None, None, None
