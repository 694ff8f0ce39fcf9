"""rearrange as models write it: permute + contiguous for affine plans, index_select and a norm for gathers; else the
definition. Each also compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu import rivals as room
from benchmarks.gpu.cases import Race
from benchmarks.gpu.rivals import generic
from vkernels.ops.rearrange.api import prepare


def _permute(kwargs: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    x, plan = kwargs["x"], kwargs["plan"]
    if plan.pattern is None or set(kwargs) != {"x", "plan"}:
        return None
    affine = plan.pattern.resolve(tuple(x.shape))
    strides = [0 if axis < 0 else x.stride(axis) * step for axis, step in zip(affine.axes, affine.steps, strict=True)]
    return lambda: x.as_strided(affine.sizes, strides).reshape(affine.out_shape)


def _gather(kwargs: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
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


def rivals(race: Race, kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], room.Rival]]]:
    if isinstance(kwargs["x"], torch.Tensor):
        for name, call in (("permute + contiguous", _permute(kwargs)), ("index_select, norm", _gather(kwargs))):
            if call is not None:
                yield name, lambda name=name, call=call: room.Rival(name, call)
                label = f"{name}, compiled"
                yield label, lambda label=label, call=call: room.Rival(label, room.compiled(call))
                return
    yield from generic.rivals(race, kwargs)
