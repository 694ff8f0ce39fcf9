"""What the ranks do under torch.compile. Every function runs on each of them with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.tensor import DTensor, Shard
from work import masks, whole

import vkernels as vk
from vkernels import distributed as vd

GRID = vk.Grid(5, 3, 1)


def moved(x: Tensor, mask, group) -> Tensor:
    mine = vd.scatter_tokens(x, mask, group)
    return vd.gather_tokens(mine * mine, mask, group)


def attended(q: Tensor, k: Tensor, v: Tensor, mask, scheme: str) -> Tensor:
    out, lse = vd.attention(q, k, v, mask, scheme=scheme, return_lse=True)
    return 2 * out + lse.exp().transpose(1, 2)[..., None]


def traded(x: Tensor, cls: int) -> Tensor:
    def layer(y, axis):
        q, k, v = y.unflatten(-1, (3, 4, 8)).unbind(2)
        return vd.divided_attention(q, k, v, GRID, axis, cls=cls).flatten(2).repeat(1, 1, 3)

    return layer(vd.trade(layer(x, "temporal"), GRID, "spatial", cls=cls), "spatial")


def same(run: Callable, compiled: Callable, *args) -> bool:
    """Whether outputs and gradients are those of the eager call."""
    given = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    found = []
    for call in (run, compiled):
        out = call(*given)
        random = torch.Generator().manual_seed(2)
        weight = torch.randn(out.shape, generator=random)
        found.append((out, *torch.autograd.grad((out * weight).sum(), [x for x in given if isinstance(x, Tensor)])))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*found, strict=True))


@cache
def alone() -> dist.ProcessGroup:
    """The group of this rank."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def calls(kind: str) -> tuple[Callable, list[tuple]]:
    """What is compiled, and arguments: another mask, the first again, another batch, another group."""
    if kind == "trade":
        x = torch.randn(2, 15, 96, generator=torch.Generator().manual_seed(5))
        return traded, [(vd.take(torch.cat([x[:, :cls], x], 1), GRID, "temporal", cls=cls), cls) for cls in (1, 0)]
    two, one = whole(24, 4, 4)[:3], whole(24, 4, 4, b=1)[:3]
    if kind == "tokens":
        return moved, [(two[0], 24, None), (two[0], masks()["keep_window"], None), (one[0], 24, alone())]
    found = [masks()["causal"], masks()["keep_window"]]  # of as many tokens on each rank: only the mask is another
    if kind != "heads":
        found = [vd.plan_shards(mask, 2, chunk=5 if kind == "gather" else None) for mask in found]
    given = [(two, found[0]), (two, found[1]), (two, found[0]), (one, found[0])][: 4 if kind == "gather" else 2]
    return attended, [(*(vd.scatter_tokens(x, mask) for x in xs), mask, kind) for xs, mask in given]


def graphs(kind: str, backend: str, most: int) -> set[str]:
    """Calls in one graph each, forward and backward; the collectives in these graphs."""
    torch._dynamo.reset()
    found = set()

    def noted(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        nodes = [node for part in graph.modules() for node in getattr(part, "graph", torch.fx.Graph()).nodes]
        found.update(str(node.target) for node in nodes if node.op == "call_function")
        return lookup_backend(backend)(graph, inputs)

    run, given = calls(kind)
    compiled = torch.compile(run, fullgraph=True, backend=noted)
    assert all([same(run, compiled, *args) for args in given[:most]])
    return {name.split(".")[1] for name in found if name.startswith(("_c10d_functional.", "vkernels.ring"))}


def mixed() -> bool:
    """One rank runs a graph, as the others do while they trace or have given up tracing: it is the same call."""
    mask, (q, k, v) = masks()["frame_causal"], whole(24, 4, 4)[:3]
    args = *(vd.scatter_tokens(x, mask) for x in (q, k, v)), mask, "gather"
    compiled = torch.compile(attended, fullgraph=True, backend="aot_eager")
    return torch.allclose((compiled if dist.get_rank() else attended)(*args), attended(*args), atol=1e-5)


def disagree(kind: str) -> None:
    """A graph whose call must be refused on every rank before anything is sent."""
    torch._dynamo.reset()
    odd, mask, other = dist.get_rank() == 1, masks()["frame_causal"], masks()["causal"]
    x = torch.randn(2, 12 + (odd and kind == "tokens"), 4, 8, requires_grad=True)

    def step(x: Tensor, mask, other) -> Tensor:
        if kind == "gather":
            return vd.gather_tokens(x[..., : 4 + 4 * odd], mask)
        if kind == "trade":
            grid = vk.Grid(4, 3, 2)
            return vd.trade(x, grid, "spatial" if not odd else "time")
        if kind == "second":  # equal to the first call, and made one with it, on one rank
            return vd.gather_tokens(x, mask) + vd.gather_tokens(x, other)
        return 2 * vd.attention(x, x, x, mask, scheme="heads" if kind == "scheme" and odd else "ring")

    torch.compile(step, fullgraph=True, backend="aot_eager")(
        x, other if kind == "mask" and odd else mask, other if odd else mask
    )


def dtensors() -> bool:
    """DTensors, at which the graph breaks."""
    mask, mesh = masks()["causal"], dist.init_device_mesh("cpu", (dist.get_world_size(),))
    q, k, v = (DTensor.from_local(vd.scatter_tokens(x, mask), mesh, (Shard(1),)) for x in whole(24)[:3])
    out = torch.compile(lambda q, k, v: vd.attention(q, k, v, mask), backend="eager")(q, k, v)
    return torch.equal(out.to_local(), vd.attention(q, k, v, mask).to_local())
