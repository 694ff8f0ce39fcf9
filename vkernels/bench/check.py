"""Correct first: a call against its definition in float64, before anything is timed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from vkernels.bench.problem import Call, Problem, outputs, pulls_of
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
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def with_gradients(call: Call, leaves: Sequence[torch.Tensor]) -> Call:
    """Forward and backward: (output, gradients)."""

    def both() -> tuple[torch.Tensor, ...]:
        made = [x for x in outputs(call()) if x.requires_grad and x.dtype == leaves[0].dtype]
        found = torch.autograd.grad(made, leaves, pulls(made), allow_unused=True)
        return (*made, *(x for x in found if x is not None))

    kept: list[torch.Tensor] = []

    def pulls(made: list[torch.Tensor]) -> list[torch.Tensor]:
        if not kept:
            kept.extend(pulls_of(made))
        return kept

    return both


class Truth:
    """What a problem's outputs are in float64, on as many heads as a definition over all pairs has memory for."""

    def __init__(self, problem: Problem, leaves: bool, device: str):
        """`problem` is made in float64, in the dtype itself where the op is an exact move."""
        self.problem, self.exact = problem, bool(problem.spec and problem.spec.exact)
        kwargs = problem.kwargs
        q, k = kwargs.get("q"), kwargs.get("k")
        self.heads = problem.op in ("attention", "divided_attention") and not kwargs.get("rope")
        if self.heads and isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor):
            group = q.shape[2] // k.shape[2] if leaves else 1
            if problem.op == "attention":
                needed = 5.0 * 8 * q.shape[0] * group * q.shape[1] * k.shape[1]
                if needed > memory_left(device) / 2:
                    raise MemoryError("the definition in float64 does not fit the memory")
            kwargs.update(q=q[:, :, :group], k=k[:, :, :1], v=kwargs["v"][:, :, :1])
        if problem.spec is None:
            raise MemoryError("a mask has no definition in float64")
        grads = problem.leaves() if leaves else []
        call = problem.ours("reference")
        if self.exact:
            self.want = tensors_of(problem.spec, call())
        elif leaves:
            self.want = list(with_gradients(call, grads)())
        else:
            with torch.no_grad():
                self.want = self.seen(call())

    def seen(self, result: Any) -> list[torch.Tensor]:
        """What of a result is compared."""
        if self.exact and self.problem.spec is not None:
            return tensors_of(self.problem.spec, result)
        return outputs(result)

    def error(self, result: Any) -> float:
        got = self.seen(result)[: len(self.want)]
        if self.heads:
            got = [x[:, :, : y.shape[2]] for x, y in zip(got, self.want, strict=True)]
        return relative_error(got, self.want)
