"""Correct first: a call against its definition in float64, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from vkernels.bench.problem import Call, Problem, outputs, pulls_of, without_gradients
from vkernels.testing.results import tensors_of

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of the largest magnitude


def tensors(result: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]


def relative_error(got: Any, want: Any) -> float:
    """Largest difference over the outputs, relative to each output's largest magnitude."""
    worst = 0.0
    a, b = tensors(got), tensors(want)
    assert len(a) == len(b), f"{len(a)} outputs against {len(b)}"
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape, f"shape {tuple(x.shape)} against {tuple(y.shape)}"
        x, y = x.detach().double(), y.detach().double()
        scale = y.abs().max().item() if y.numel() else 1.0
        error = ((x - y).abs().max().item() if y.numel() else 0.0) / max(scale, 1e-12)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def memory_left(device: str) -> float:
    """Bytes free for the taking."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8e9


def with_gradients(call: Call, leaves: Sequence[torch.Tensor], pulls: Sequence[torch.Tensor] = ()) -> Call:
    """Forward and backward: (outputs, gradients). `pulls` arrive at the outputs; without them, random ones."""
    kept = list(pulls)

    def both() -> tuple[torch.Tensor, ...]:
        made = [x for x in outputs(call()) if x.requires_grad and x.dtype == leaves[0].dtype]
        if not kept:
            kept.extend(pulls_of(made))
        found = torch.autograd.grad(made, leaves, kept[: len(made)], allow_unused=True)
        return (*made, *(x for x in found if x is not None))

    return both


HEADS_APART = ("attention", "divided_attention", "apply_rope")  # what a head gives depends on that head alone


class Truth:
    """What a problem's outputs are in float64. Where heads are apart, those of the first: a definition over all pairs
    of all heads would not fit the memory."""

    def __init__(self, problem: Problem, gradients: bool, device: str, remade: Callable[[torch.dtype], Problem]):
        """`remade` makes the problem's arguments again, in another dtype; only a cache needs it. Raises MemoryError
        where there is no definition to be had."""
        spec = problem.spec
        if spec is None:
            raise MemoryError("a mask has no definition in float64")
        self.spec, self.exact = spec, spec.exact
        self.apart = problem.op in HEADS_APART and not problem.kwargs.get("rope")
        if self.exact:
            self.want = self.seen(remade(dtype_of(problem)).ours("reference")())
            return
        cache = problem.kwargs.get("cache")
        self.rows = problem.op == "qkv_prologue" and cache is not None and not cache.bits
        if cache is not None and not self.rows:
            own = remade(torch.float64)
        else:
            kwargs = self._first_head(problem.kwargs, gradients, device) if self.apart else problem.kwargs
            without = {name: x for name, x in kwargs.items() if name != "cache"}  # full-width rows are what it returns
            own = Problem(problem.op, tree_map(_widened, without))
        call, leaves = own.ours("reference"), own.leaves() if gradients else []
        pulls = _first_pulls(problem.kwargs, own.kwargs) if self.apart and leaves else ()
        self.want = list(with_gradients(call, leaves, pulls)() if leaves else self.seen(without_gradients(call)()))
        if self.rows:
            self.want = [self.want[0], *(x.transpose(1, 2) for x in self.want[1:])]

    def _first_head(self, kwargs: dict[str, Any], gradients: bool, device: str) -> dict[str, Any]:
        q, k = kwargs["q"], kwargs.get("k")
        if k is None or q.shape[2] < k.shape[2] or len(getattr(kwargs.get("spec"), "axis_rows", "1")) > 1:
            self.apart = False
            return kwargs
        group = q.shape[2] // k.shape[2] if gradients else 1  # its keys collect gradients from all of its queries
        pairs = q.shape[0] * group * q.shape[1] * k.shape[1] if self.spec.name == "attention" else 0
        if 5.0 * 8 * pairs > memory_left(device) / 2:
            raise MemoryError("the definition in float64 does not fit the memory")
        first: dict[str, Any] = {name: kwargs[name][:, :, :1] for name in ("k", "v") if name in kwargs}
        return {**kwargs, **first, "q": q[:, :, :group]}

    def seen(self, result: Any) -> list[torch.Tensor]:
        """What of a result is compared."""
        return tensors_of(self.spec, result) if self.exact else outputs(result)

    def error(self, result: Any) -> float:
        got = self.seen(result)[: len(self.want)]
        if self.apart:
            got = [x[:, :, : y.shape[2]] for x, y in zip(got, self.want, strict=True)]
        return relative_error(got, self.want)


def _first_pulls(whole: dict[str, Any], first: dict[str, Any]) -> list[torch.Tensor]:
    """What everyone's outputs, shaped like q and like k, receive from behind; of the first head, in float64."""
    pulls = pulls_of([whole["q"], whole["k"]])
    return [pull[:, :, : first[name].shape[2]].double() for name, pull in zip("qk", pulls, strict=True)]


def _widened(x: Any) -> Any:
    return x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def dtype_of(problem: Problem) -> torch.dtype:
    floats = [x for x in tensors(problem.kwargs) if x.is_floating_point()]
    return floats[0].dtype
