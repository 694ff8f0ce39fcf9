"""Divided attention over ranks: temporal layers hold all frames of some places, spatial layers all places of some
frames, and one all-to-all stands between them."""

from __future__ import annotations

from itertools import accumulate
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
from vkernels.masks import Grid
from vkernels.named import like, look, named
from vkernels.ops.divided_attention import divided_attention as divided_own

OP = "distributed.divided_attention"
AXES = ("temporal", "spatial")


def shares(count: int, world: int) -> list[int]:
    """`count` frames or places over the ranks, as even as can be."""
    return [count // world + (r < count % world) for r in range(world)]


def own_grid(grid: Grid, axis: str, world: int, rank: int) -> Grid:
    """What a rank holds for layers of `axis`: all frames of its places, or all places of its frames."""
    require(axis in AXES, OP, "axis", f"be one of {', '.join(AXES)}", repr(axis))
    if axis == "temporal":
        return Grid(grid.t, 1, shares(grid.h * grid.w, world)[rank])
    return Grid(shares(grid.t, world)[rank], grid.h, grid.w)


def _check(op: str, name: str, x: Tensor, tokens: int) -> None:
    if x.dim() < 2 or x.shape[1] != tokens:
        raise ShapeError(refusal(op, name, f"hold this rank's {tokens} tokens", tuple(x.shape)))


def take(x: Tensor, grid: Grid, axis: str, mesh: Any = None, *, cls: int = 0) -> Tensor:
    """This rank's tokens, for layers of `axis`, of x [b, cls + t h w, ...], whole on every rank; the CLS stays."""
    world, me = size_and_rank(group_of(mesh, "distributed.take"))
    _check("distributed.take", "x", x, cls + grid.tokens)
    starts = [0, *accumulate(shares(grid.h * grid.w if axis == "temporal" else grid.t, world))]
    body = x[:, cls:].unflatten(1, (grid.t, grid.h * grid.w))
    mine = slice(starts[me], starts[me + 1])
    body = body[:, :, mine] if axis == "temporal" else body[:, mine]
    return torch.cat([x[:, :cls], body.flatten(1, 2)], 1)


def trade(x: Tensor, grid: Grid, axis: str, mesh: Any = None, *, cls: int = 0) -> Tensor:
    """Tokens [b, cls + own, ...] held for the other axis, to those for layers of `axis`: one all-to-all.

    Args:
        x:    this rank's tokens, frame-major behind `cls` that every rank has
        grid: of the whole video
        axis: "temporal" or "spatial", of the layers to come
        mesh: a one-dimensional DeviceMesh or a ProcessGroup; None: everyone
    Gradients: x.   Sends 1 - 1 / world of what a rank holds.
    """
    op = "distributed.trade"
    group = group_of(mesh, op)
    world, me = size_and_rank(group)
    call = _trading(*map(named, grid.shape), axis, world, me, named(cls), look(x))
    if call.told.kind:
        return agree(op, call.told, group, x.new_empty((x.shape[0], cls + call.own, *x.shape[2:])))[0]
    (x,) = agree(op, call.told, group, x)
    return torch.cat([x[:, :cls], _Trade.apply(x[:, cls:], call.frames, call.places, me, axis, group)], 1)


class _Trading(NamedTuple):
    """What follows from the arguments of a trade without their values."""

    told: Told
    frames: tuple[int, ...] = ()  # of each rank
    places: tuple[int, ...] = ()
    own: int = 0  # tokens this rank gets


@torch.compiler.assume_constant_result
def _trading(t: int, h: int, w: int, axis: str, world: int, me: int, cls: int, x: Any) -> _Trading:
    op, grid, x = "distributed.trade", Grid(t, h, w), like(x)
    try:
        require(axis in AXES, op, "axis", f"be one of {', '.join(AXES)}", repr(axis))
        _check(op, "x", x, cls + own_grid(grid, _other(axis), world, me).tokens)
    except (ValueError, TypeError) as error:
        return _Trading(refused(error))
    told = fingerprint(grid, axis, cls, x.shape[:1], x.shape[2:], x.dtype)
    frames, places = tuple(shares(t, world)), tuple(shares(h * w, world))
    return _Trading(told, frames, places, own_grid(grid, axis, world, me).tokens)


def _other(axis: str) -> str:
    return "spatial" if axis == "temporal" else "temporal"


def _trade(x: Tensor, frames: tuple[int, ...], places: tuple[int, ...], me: int, axis: str, group: Any) -> Tensor:
    rows = x.transpose(0, 1)
    here = [count * places[me] for count in frames]  # what a rank's frames are of this one's places
    there = [frames[me] * count for count in places]
    if axis == "spatial":  # frame-major, so cut by frames as it is; comes as frames of rank 0's places, of rank 1's
        parts = all_to_all(rows.contiguous(), here, there, group).split(there)
        wide = [part.unflatten(0, (frames[me], count)) for part, count in zip(parts, places, strict=True)]
        return torch.cat(wide, 1).flatten(0, 1).transpose(0, 1)
    cut = rows.unflatten(0, (frames[me], sum(places))).split(places, 1)
    return all_to_all(torch.cat([part.flatten(0, 1) for part in cut]), there, here, group).transpose(0, 1)


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: Any, places: Any, me: int, axis: str, group: Any) -> Tensor:  # type: ignore[override]
        ctx.frames, ctx.places, ctx.me, ctx.axis, ctx.group = frames, places, me, axis, group
        return _trade(x, frames, places, me, axis, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        back = _trade(grad, ctx.frames, ctx.places, ctx.me, _other(ctx.axis), ctx.group)
        return back, None, None, None, None, None


def divided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    axis: str,
    mesh: Any = None,
    *,
    cls: int = 0,
    scale: float | None = None,
    rope: Any = None,
    backend: str | None = None,
) -> Tensor:
    """`vkernels.divided_attention` of the whole video on what each rank holds for `axis` (`take`, `trade`).

    Args:
        q, k, v: (b cls+own n d), (b cls+own m d), frame-major; every rank has the CLS rows
        grid:    of the whole video
        axis:    "temporal": nothing is sent; "spatial": one CLS row per rank, whose outputs' mean over all frames every
                 rank gets
        rope:    (spec, positions) of all frames, or of all patches of a frame: whole on every rank, as what attends is
        mesh, cls, scale, backend: as elsewhere
    Returns:
        (b cls+own n d)
    Gradients: q, k, v; those of the CLS rows are this rank's part, to be summed over the ranks like a parameter's.
    Source: TimeSformer, arXiv:2102.05095.
    """
    group = group_of(mesh, OP)
    world, me = size_and_rank(group)
    mine, cls = own_grid(grid, axis, world, me), named(cls)
    _check(OP, "q", q, cls + mine.tokens)
    if axis == "temporal" or cls == 0:
        return divided_own(q, k, v, mine, axis=axis, cls=cls, scale=scale, rope=rope, backend=backend)
    if mine.t:
        out = divided_own(q, k, v, mine, axis=axis, cls=cls, scale=scale, rope=rope, backend=backend)
    else:
        out = torch.zeros_like(q)
    first = _Sum.apply(out[:, :cls] * (mine.t / max(grid.t, 1)), group)
    return torch.cat([first.to(out.dtype), out[:, cls:]], 1)


class _Sum(torch.autograd.Function):
    """Over the ranks, both ways: the loss is the sum of what each rank has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _summed(grad, ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    return all_gather(x.float().contiguous(), x.shape[0], group).sum(0).to(x.dtype)
