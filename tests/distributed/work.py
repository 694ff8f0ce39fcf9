"""What the ranks do. Every function runs on each of them with the same arguments."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

import vkernels as vk
from vkernels import distributed as vd


def masks() -> dict:
    """Every kind of mask, 24 tokens, two samples."""
    grid, s = vk.Grid(4, 3, 2), 24
    random = torch.Generator().manual_seed(1)
    keep = torch.rand(2, s, generator=random) < 0.6
    spans = [vk.Text(5), vk.Video(2, 2, 3), vk.Text(7)]
    return {
        "all": s,
        "joint": vk.VideoMask.joint(grid),
        "spatial": vk.VideoMask.spatial(grid),
        "temporal": vk.VideoMask.temporal(grid),
        "frame_causal": vk.VideoMask.frame_causal(grid),
        "frame_window": vk.VideoMask.frame_causal(grid, window=2),
        "causal": vk.VideoMask.causal(s),
        "window": vk.VideoMask.window(grid, (1, 1, 1)),
        "spans": vk.VideoMask.spans(spans, within="frame"),
        "keep": vk.VideoMask.frame_causal(grid).keep(keep, queries=True),
        "keep_keys": vk.VideoMask.joint(grid).keep(keep),
        "keep_window": vk.VideoMask.window(grid, (1, 1, 1)).keep(keep, queries=True),
        "nothing": vk.VideoMask.causal(s).keep(torch.zeros(s, dtype=torch.bool), queries=True),
        "block_ids": vk.VideoMask.from_block_ids(torch.randint(0, 4, (2, s), generator=random)),
        "globals": vk.VideoMask.frame_causal(vk.Grid(23, 1, 1)).with_globals(1),
        "packed": vk.VideoMask.pack([vk.VideoMask.causal(9), vk.VideoMask.frame_causal(vk.Grid(5, 3, 1))]),
        "cu_seqlens": vk.VideoMask.from_cu_seqlens([0, 7, 7, 24]),
        "plan": vk.VideoMask.frame_causal(grid).plan("cpu"),
    }


def whole(s: int, n: int = 4, m: int = 2, d: int = 8, b: int = 2) -> list[torch.Tensor]:
    """The same tensors on every rank: q, k, v, and what gradients start from."""
    random = torch.Generator().manual_seed(7)
    shapes = [(b, s, n, d), (b, s, m, d), (b, s, m, d), (b, s, n, d), (b, n, s)]
    return [torch.randn(shape, generator=random) for shape in shapes]


def single(mask, q, k, v, weight, weight_lse):
    """Output, lse and gradients of one process."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    given = None if isinstance(mask, int) else mask
    out, lse = vk.attention(q, k, v, mask=given, return_lse=True)
    sees = lse > -torch.inf
    grads = torch.autograd.grad((out * weight).sum() + (lse * weight_lse)[sees].sum(), (q, k, v), allow_unused=True)
    return out.detach(), lse.detach(), *grads


def together(mask, scheme: str, chunk: int | None, heads: tuple[int, int]) -> list[torch.Tensor]:
    """The same, of all ranks, gathered on each."""
    s = vd.shards.tokens_of(mask)
    world = dist.get_world_size()
    shards = vd.plan_shards(mask, world, chunk=chunk)
    q, k, v, weight, weight_lse = whole(s, *heads)
    mine = [vd.scatter_tokens(x, shards).requires_grad_() for x in (q, k, v)]
    w, w_lse = vd.scatter_tokens(weight, shards), vd.scatter_tokens(weight_lse, shards, dim=2)
    with vd.traffic() as sent:
        out, lse = vd.attention(*mine, shards, scheme=scheme, return_lse=True)
    sees = lse > -torch.inf
    with vd.traffic() as sent_back:
        grads = torch.autograd.grad((out * w).sum() + (lse * w_lse)[sees].sum(), mine)
    b, _, n, d = q.shape
    for counted, cost in ((sent, vd.forward_cost), (sent_back, vd.backward_cost)):
        model = cost(scheme, shards, dist.get_rank(), b, n, k.shape[2], d, 4)
        assert (counted.bytes, counted.messages) == (model.bytes, model.messages), (counted, model)
    gathered = [vd.gather_tokens(x, shards) for x in (out.detach(), *grads)]
    return [gathered[0], vd.gather_tokens(lse.detach(), shards, dim=2), *gathered[1:]]


def worst(names: list[str], scheme: str, chunk: int | None, heads: tuple[int, int]) -> dict[str, float]:
    """Largest difference from one process, per mask."""
    found = {}
    for name in names:
        mask = masks()[name]
        want = single(mask, *whole(vd.shards.tokens_of(mask), *heads))
        got = together(mask, scheme, chunk, heads)
        same = [
            torch.equal(a.isinf(), b.isinf()) and torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=1e-5, atol=1e-5)
            for a, b in zip(got, want, strict=True)
        ]
        differences = [(a - b).masked_fill(b.isinf(), 0).abs().max().item() for a, b in zip(got, want, strict=True)]
        found[name] = max(differences) if all(same) else float("inf")
    return found


def in_bfloat16(scheme: str) -> float:
    """Largest difference of outputs and gradients, against their largest number, from float32 in one process."""
    mask, (q, k, v) = masks()["frame_causal"], whole(24, 4, 4)[:3]
    alone = [x.requires_grad_() for x in (q, k, v)]
    want = vk.attention(*alone, mask=mask)
    mine = [vd.scatter_tokens(x.detach().bfloat16(), mask).requires_grad_() for x in alone]
    out = vd.attention(*mine, mask, scheme=scheme)
    pairs = [(out.detach(), want.detach())]
    pairs += zip(torch.autograd.grad(out.sum(), mine), torch.autograd.grad(want.sum(), alone), strict=True)
    return max(float((a - vd.scatter_tokens(b, mask)).abs().max() / b.abs().max()) for a, b in pairs)


def moved() -> bool:
    """Tokens and their labels, there and back, with gradients."""
    mask, rank = masks()["frame_causal"], dist.get_rank()
    x = torch.arange(48.0).view(2, 24, 1).requires_grad_()
    mine = vd.scatter_tokens(x, mask)
    shards = vd.plan_shards(mask, dist.get_world_size())
    assert torch.equal(mine[0, :, 0], shards.tokens[rank].float())
    back = vd.gather_tokens(mine, mask)
    assert torch.equal(back, x)
    weight = torch.arange(24.0)[None, :, None].expand(2, 24, 1)
    (back * weight).sum().backward()  # every rank has the loss: gradients of all of them are summed
    return torch.equal(x.grad, weight * dist.get_world_size())


def decoded(lengths: list[int]) -> float:
    """One token against a cache cut over the ranks."""
    random = torch.Generator().manual_seed(3)
    total = sum(lengths)
    q, k, v = (torch.randn(2, s, n, 16, generator=random) for s, n in ((1, 4), (total, 2), (total, 2)))
    cache = vk.KVCache("fp32", b=2, m=2, d=16, capacity=max(total, 1))
    start = sum(lengths[: dist.get_rank()])
    part = slice(start, start + lengths[dist.get_rank()])
    if lengths[dist.get_rank()]:
        cache.append(k[:, part], v[:, part])
    with vd.traffic() as sent:
        out, lse = vd.decode_attention(q, cache, return_lse=True)
    assert sent.bytes == (len(lengths) - 1) * 2 * 4 * (16 + 1) * 4  # an output and an lse to each other rank
    want, want_lse = vk.attention(q, k, v, return_lse=True)
    return max((out - want).abs().max().item(), (lse - want_lse).abs().max().item())


def disagree(kind: str) -> None:
    """A call that must be refused on every rank before anything is sent."""
    rank, world = dist.get_rank(), dist.get_world_size()
    odd = rank == world - 1
    mask = vk.VideoMask.causal(24) if kind == "mask" and odd else vk.VideoMask.frame_causal(vk.Grid(4, 3, 2))
    own = len(vd.plan_shards(mask, world).tokens[rank]) + (kind == "tokens" and odd)
    d = 16 if kind == "shape" and odd else 8
    dtype = torch.bfloat16 if kind == "dtype" and odd else torch.float32
    q = torch.randn(2, own, 4, d, dtype=dtype)
    if kind == "gather":
        vd.gather_tokens(q[..., : 4 + 4 * odd], mask)
    if kind == "trade":
        grid = vk.Grid(4, 3, 2)
        vd.trade(vd.take(torch.randn(2 + odd, 24, 8), grid, "temporal"), grid, "spatial")
    vd.attention(q, q, q, mask, scheme="heads" if kind == "scheme" and odd else "ring")


def leave(rank: int, kind: str) -> None:
    """Rank `rank` is gone, or stands still, before a call or between its forward and its backward."""
    gone = dist.get_rank() == rank
    if gone and kind == "dies":
        os._exit(1)
    q, k, v = whole(24)[:3]
    mask = vk.VideoMask.joint(vk.Grid(4, 3, 2))
    mine = [vd.scatter_tokens(x, mask).requires_grad_() for x in (q, k, v)]
    out = vd.attention(*mine, mask, scheme="ring")
    if gone:
        time.sleep(60)
    out.sum().backward()


def meshes() -> bool:
    """A DeviceMesh, one dimension of two, a group: the same call."""
    world = dist.get_world_size()
    mask, (q, k, v) = masks()["causal"], whole(24)[:3]
    one = dist.init_device_mesh("cpu", (world,))
    two = dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tokens"))
    wants = None
    for mesh in (None, one, two["tokens"], dist.group.WORLD):
        out = vd.attention(*(vd.scatter_tokens(x, mask, mesh) for x in (q, k, v)), mask, mesh)
        wants = out if wants is None else wants
        assert torch.equal(out, wants)
    try:
        vd.attention(q, k, v, mask, two)
    except ValueError as error:
        return "be a one-dimensional DeviceMesh" in str(error)
    return False


# ---- divided attention


def divided(cls: int, turned: bool) -> float:
    """A temporal and a spatial layer with a trade between, against one process, gradients included."""
    world, rank = dist.get_world_size(), dist.get_rank()
    grid, random = vk.Grid(5, 3, 1), torch.Generator().manual_seed(5)
    x = torch.randn(2, cls + grid.tokens, 3 * 4 * 8, generator=random)
    weight = torch.randn(2, cls + grid.tokens, 4, 8, generator=random)

    spec = vk.RopeSpec.build(8)
    ropes = {"temporal": (spec, 0.5 * torch.arange(grid.t)), "spatial": (spec, torch.arange(grid.h * grid.w).float())}
    of = {axis: dict(cls=cls, rope=rope if turned else None) for axis, rope in ropes.items()}

    def layer(y, run):
        return run(*y.unflatten(-1, (3, 4, 8)).unbind(2))

    one = x.clone().requires_grad_()
    out = (
        layer(one, lambda *qkv: vk.divided_attention(*qkv, grid, axis="temporal", **of["temporal"]))
        .flatten(2)
        .repeat(1, 1, 3)
    )
    want = layer(out, lambda *qkv: vk.divided_attention(*qkv, grid, axis="spatial", **of["spatial"]))
    (want_grad,) = torch.autograd.grad((want * weight).sum(), one)

    mine = vd.take(x, grid, "temporal", cls=cls).requires_grad_()
    with vd.traffic() as sent:
        out = (
            layer(mine, lambda *qkv: vd.divided_attention(*qkv, grid, "temporal", **of["temporal"]))
            .flatten(2)
            .repeat(1, 1, 3)
        )
        assert sent.bytes == 0
        traded = vd.trade(out, grid, "spatial", cls=cls)
        places, frames = vd.own_grid(grid, "temporal", world, rank).w, vd.own_grid(grid, "spatial", world, rank).t
        assert sent.bytes == 2 * places * (grid.t - frames) * out.shape[2] * 4
        got = layer(traded, lambda *qkv: vd.divided_attention(*qkv, grid, "spatial", **of["spatial"]))
    part = vd.take(weight, grid, "spatial", cls=cls)
    if cls:  # every rank has the CLS; its loss counts once
        part = torch.cat([part[:, :cls] / world, part[:, cls:]], 1)
    (grad,) = torch.autograd.grad((got * part).sum(), mine)
    first = grad[:, :cls].contiguous()
    dist.all_reduce(first)
    grad = torch.cat([first, grad[:, cls:]], 1)
    back = vd.trade(got, grid, "temporal", cls=cls)
    assert torch.equal(vd.trade(back, grid, "spatial", cls=cls), got)
    differences = [got - vd.take(want, grid, "spatial", cls=cls), grad - vd.take(want_grad, grid, "temporal", cls=cls)]
    return max((d.abs().max().item() if d.numel() else 0.0) for d in differences)


# ---- inside the engines people run


class Block(torch.nn.Module):
    def __init__(self, mask, scheme):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.mask, self.scheme = mask, scheme

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        if self.scheme is None:
            return x + self.out(vk.attention(q, k, v, mask=self.mask).flatten(2))
        return x + self.out(vd.attention(q, k, v, self.mask, scheme=self.scheme).flatten(2))


def engine(kind: str) -> float:
    """Two blocks under DDP, FSDP2 or activation checkpointing: outputs and parameter gradients of one process."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint

    mask, world = masks()["frame_causal"], dist.get_world_size()
    torch.manual_seed(0)
    one = torch.nn.Sequential(Block(mask, None), Block(mask, None))
    mine = torch.nn.Sequential(Block(mask, "ring"), Block(mask, "heads"))
    mine.load_state_dict(one.state_dict())
    x, weight = torch.randn(2, 24, 32), torch.randn(2, 24, 32)
    want = one(x)
    (want * weight).sum().backward()
    model = mine
    if kind == "ddp":
        model = DistributedDataParallel(mine)
    elif kind == "fsdp":
        mesh = dist.init_device_mesh("cpu", (world,))
        for block in mine:
            fully_shard(block, mesh=mesh)
        fully_shard(mine, mesh=mesh)
    own = vd.scatter_tokens(x, mask)
    out = checkpoint(model, own, use_reentrant=False) if kind == "checkpoint" else model(own)
    (out * vd.scatter_tokens(weight, mask)).sum().backward()
    worst_of = (out - vd.scatter_tokens(want, mask)).abs().max().item()
    for (_, a), (_, b) in zip(mine.named_parameters(), one.named_parameters(), strict=True):
        grad = a.grad.full_tensor() if kind == "fsdp" else a.grad
        if kind == "checkpoint":
            dist.all_reduce(grad)
            grad = grad / world
        worst_of = max(worst_of, (grad * world - b.grad).abs().max().item())
    return worst_of


def dtensors() -> bool:
    """DTensor in, DTensor out."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mask, (q, k, v) = masks()["causal"], whole(24)[:3]
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    local = [vd.scatter_tokens(x, mask) for x in (q, k, v)]
    shards = [DTensor.from_local(x, mesh, (Shard(1),)) for x in local]
    out, lse = vd.attention(*shards, mask, return_lse=True)
    want, want_lse = vd.attention(*local, mask, return_lse=True)
    assert out.shape == q.shape
    assert out.placements == (Shard(1),)
    assert torch.equal(out.to_local(), want)
    assert torch.equal(lse.to_local(), want_lse)

    heads = [distribute_tensor(x, mesh, (Shard(2),)).requires_grad_() for x in (q, k, v)]
    with vd.traffic() as sent:
        out, lse = vd.attention(*heads, mask, return_lse=True)
        out.sum().backward()
    alone = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = vk.attention(*alone, mask=mask, return_lse=True)
    want.sum().backward()
    pairs = [(out, want), (lse, want_lse), *((a.grad, b.grad) for a, b in zip(heads, alone, strict=True))]
    return sent.bytes == 0 and all(torch.allclose(a.full_tensor(), b, atol=1e-5) for a, b in pairs)
