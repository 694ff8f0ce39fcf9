"""rearrange as models write it: permute + contiguous for affine plans, index_select and a norm for gathers; and the
same compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vkernels.bench import rivals as room
from vkernels.bench.problem import Call, Problem
from vkernels.ops.rearrange.api import prepare


def _permute(problem: Problem) -> Call | None:
    x, plan = problem.kwargs["x"], problem.kwargs["plan"]
    if plan.pattern is None or set(problem.kwargs) != {"x", "plan"}:
        return None
    affine = plan.pattern.resolve(tuple(x.shape))
    strides = [0 if axis < 0 else x.stride(axis) * step for axis, step in zip(affine.axes, affine.steps, strict=True)]
    return lambda: x.as_strided(affine.sizes, strides).contiguous().view(affine.out_shape)


def _gather(problem: Problem) -> Call | None:
    kwargs = problem.kwargs
    x, plan = kwargs["x"], kwargs["plan"]
    known = {"x", "plan", "norm", "norm_weight", "norm_bias"}
    if plan.pattern is not None or not plan.is_gather or plan.fills or len(plan.sources) > 1 or set(kwargs) - known:
        return None
    index = plan.index.to(x.device)
    if x.dim() != 3 or index.shape[0] != 1 or x.shape[1] != plan.n_in or bool((index < 0).any()):
        return None
    rows, norm, c, shape = index[0].long(), kwargs.get("norm"), x.shape[-1], prepare(**kwargs).shape
    if norm not in (None, "layer"):
        return None

    def run() -> torch.Tensor:
        kept = x.index_select(1, rows).reshape(shape)
        return kept if norm is None else F.layer_norm(kept, (c,), kwargs.get("norm_weight"), kwargs.get("norm_bias"))

    return run


def pooled(x: torch.Tensor, t: int, side: int, out: int) -> torch.Tensor:
    """LLaVA-OneVision's pooling: (1, t side side, c) -> (1, t out out, c)."""
    grid = x.view(t, side, side, -1).permute(0, 3, 1, 2).contiguous()
    grid = F.interpolate(grid, size=(out, out), mode="bilinear").permute(0, 2, 3, 1)
    return grid.reshape(1, t * out * out, -1)


def chain(problem: Problem) -> Call | None:
    if not isinstance(problem.kwargs["x"], torch.Tensor):
        return None
    return _permute(problem) or _gather(problem)


@room.rival("permute or index_select, norm", "rearrange")
def eager(problem: Problem) -> Call | None:
    return chain(problem)


@room.rival("permute or index_select, norm, compiled", "rearrange", compiles=True)
def fast(problem: Problem) -> Call | None:
    call = chain(problem)
    return call and room.compiled(call)
