"""Attention over tokens that several ranks hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vkernels.check import NoBackend, ShapeError, refusal, require
from vkernels.dispatch import choose
from vkernels.distributed.cost import recommended
from vkernels.distributed.exchange import Told, agree, fingerprint, group_of, refused, size_and_rank
from vkernels.distributed.schemes import SCHEMES, Route, Seat, gather, heads, ring, seat_of
from vkernels.distributed.shards import Mask, ShardPlan
from vkernels.distributed.tokens import shards_of
from vkernels.named import like, look, meant, named
from vkernels.ops.attention import api

OP = "distributed.attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | ShardPlan,
    mesh: Any = None,
    *,
    scheme: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vkernels.attention` of the whole sequence, each rank giving and getting its own tokens.

    Args:
        q, k, v:    (b own n d), (b own m d): this rank's tokens, `scatter_tokens(x, mask, mesh)`; or DTensors of these,
                    sharded over dimension 1. DTensors sharded over the heads, dimension 2, hold all tokens in the
                    mask's order; nothing is sent for them
        mask:       a VideoMask or MaskPlan of the whole sequence, a number of tokens that all see each other, or the
                    ShardPlan of one of these
        mesh:       a one-dimensional DeviceMesh or a ProcessGroup; None: everyone
        scheme:     "ring": keys and values travel part by part, the next while this one is attended to; "gather": all
                    at once; "heads": tokens are traded for heads, both of which the ranks must divide; "auto": ring
                    where its messages hide behind its compute, else what sends least
        scale:      None: 1 / sqrt(d)
        return_lse: also return the log of the sum of exponentials (b n own), float32
        backend:    as vkernels.attention, less the reference
    Returns:
        output (b own n d) like q; a DTensor where q is one
    Raises:
        ShapeError, TypeError, ValueError on every rank, before anything is sent, where one rank's arguments are refused
        or mean another call (mask, shapes, dtype, scale, scheme); the process group's own errors where a rank is gone
    Gradients: q, k, v, through output and lse.   Deterministic: yes, for a number of ranks.
    torch.compile: no break of the graph, which serves this mask and these sizes and raises where it is run. DTensors
    break it.
    Example:
        >>> shards = plan_shards(mask, world)
        >>> o = attention(*(scatter_tokens(x, shards) for x in (q, k, v)), shards)
    Source: Ring Attention, arXiv:2310.01889; DeepSpeed-Ulysses, arXiv:2309.14509.
    """
    if isinstance(q, DTensor):
        return _of_dtensors(q, k, v, mask, mesh, scheme=scheme, scale=scale, return_lse=return_lse, backend=backend)
    group = group_of(mesh, OP)
    world, me = size_and_rank(group)
    call = _prepared(named(mask), world, me, look(q), look(k), look(v), scheme, scale, backend)
    if call.told.kind:
        lse = torch.empty_like(q[..., 0], dtype=torch.float32).transpose(1, -1)
        out, lse = agree(OP, call.told, group, torch.empty_like(q), lse)
        return (out, lse) if return_lse else out
    q, k, v = agree(OP, call.told, group, q, k, v)
    how = call.scale, call.backend
    if call.scheme == "ring":
        out, lse = ring(q, k, v, *how, call.name, call.seat, group)
    else:
        run = gather if call.scheme == "gather" else heads
        out, lse = run(q, k, v, *how, call.route, group)
    return (out, lse) if return_lse else out


class _Call(NamedTuple):
    """What follows from a call's arguments without their values."""

    told: Told
    scheme: str = ""
    backend: str = ""
    scale: float = 0.0
    name: str = ""  # of the seat
    seat: Seat | None = None
    route: Route | None = None


@torch.compiler.assume_constant_result
def _prepared(
    mask: Any, world: int, me: int, q: Any, k: Any, v: Any, scheme: str, scale: float | None, backend: str | None
) -> _Call:
    try:
        shards = shards_of(meant(mask), world, OP)
        return _checked(like(q), like(k), like(v), shards, me, scheme, scale, backend)
    except (ValueError, TypeError, NotImplementedError) as error:
        return _Call(refused(error))


@torch.compiler.disable
def _of_dtensors(q: DTensor, k: Tensor, v: Tensor, mask: Mask | ShardPlan, mesh: Any, **options: Any) -> Any:
    """Tensors sharded over their tokens, as the deal has them, or over their heads; so is the result."""
    own, placed = q.device_mesh, tuple(q.placements)
    require(mesh is None or mesh == own, OP, "mesh", "be that of the DTensors, or None", mesh)
    for argument, x in (("q", q), ("k", k), ("v", v)):
        good = isinstance(x, DTensor) and x.device_mesh == own and tuple(x.placements) == placed
        rule = "be a DTensor sharded like q over tokens or heads, dimension 1 or 2, of one mesh"
        shards = getattr(x, "placements", type(x).__name__)
        require(good and placed in ((Shard(1),), (Shard(2),)), OP, argument, rule, shards)
    local: list[Any] = [x.to_local() for x in (q, k, v)]  # type: ignore[attr-defined]
    b, s, n, d = q.shape
    over_heads = placed == (Shard(2),)
    if over_heads:
        ranks, m = own.size(), k.shape[2]
        require(n % ranks == 0 and m % ranks == 0, OP, "q", f"have heads that {ranks} ranks divide", f"{n} and {m}")
    run = _own_heads if over_heads else attention
    out: Any = run(local[0], local[1], local[2], mask, own, **options)

    def whole(x: Tensor, dim: int, shape: tuple[int, ...]) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, own, (Shard(dim),), run_check=False, shape=torch.Size(shape), stride=stride)

    if not options["return_lse"]:
        return whole(out, 1 + over_heads, (b, s, n, d))
    return whole(out[0], 1 + over_heads, (b, s, n, d)), whole(out[1], 2 - over_heads, (b, n, s))


def _own_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | ShardPlan, mesh: Any, *, scheme: str, **options: Any
) -> Any:
    """All tokens of some heads: what one process computes."""
    require(scheme in ("auto", "heads"), OP, "scheme", "be auto or heads for heads that are sharded", repr(scheme))
    if isinstance(mask, ShardPlan):
        raise TypeError(refusal(OP, "mask", "be a mask and not its deal for heads that are sharded", "a ShardPlan"))
    return api.attention(q, k, v, mask=None if isinstance(mask, int) else mask, **options)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, shards: ShardPlan, me: int, scheme: str, scale: float | None, backend: str | None
) -> _Call:
    call = api.prepare(q, k, v, scale=scale)
    own = len(shards.tokens[me])
    for argument, x in (("q", q), ("k", k)):
        if x.shape[1] != own:
            raise ShapeError(refusal(OP, argument, f"hold the {own} tokens of rank {me}", x.shape[1]))
    samples = shards.flat.samples
    require(samples in (1, q.shape[0]), OP, "mask", f"be given for 1 or {q.shape[0]} samples", samples)
    name = choose("attention", api.BACKENDS, backend, call).name
    if name == "reference":
        raise NoBackend(refusal(OP, "backend", "be one with kernels of its own (cpu, cuda, triton)", name))
    require(scheme in ("auto", *SCHEMES), OP, "scheme", f"be auto, {', '.join(SCHEMES)}", repr(scheme))
    b, _, n, d = q.shape
    m = k.shape[2]
    if scheme == "auto":
        scheme = recommended(shards, b, n, m, d, q.element_size())
    if scheme == "heads":
        rule = f"have heads of queries and keys that {shards.world} ranks divide for scheme heads"
        require(n % shards.world == 0 and m % shards.world == 0, OP, "q", rule, f"{n} and {m}")
    told = fingerprint(shards.digest, b, n, m, d, q.dtype, call.scale, scheme)
    title, seat = seat_of(shards, me)
    route = None if scheme == "ring" else seat.route(scheme, q.device)
    return _Call(told, scheme, name, call.scale, title, seat, route)
