"""divided_attention as TimeSformer, LanguageBind and BT-Adapter write it: permute or repeat + cat, SDPA, and back."""

from __future__ import annotations

import torch

from vkernels.bench import problem as problems
from vkernels.bench import rivals as room
from vkernels.bench.rivals.sdpa import GPU_ONLY, KERNELS, tokens_first
from vkernels.ops.divided_attention.api import Call, prepare


def _sequences(c: Call, x: torch.Tensor) -> torch.Tensor:
    """b s n d -> (b groups places) tokens n d."""
    b, _, n, d = x.shape
    f, g, head = c.frames_per_group, c.t // c.frames_per_group, x[:, : c.cls]
    x = x[:, c.cls :]
    x = x.unflatten(1, (c.l, c.t)).transpose(1, 2) if c.order == "patch" else x.unflatten(1, (c.t, c.l))
    if c.axis == "temporal":
        return x.unflatten(1, (g, f)).transpose(2, 3).reshape(b * g * c.l, f, n, d)
    x = x.unflatten(1, (f, g)).transpose(1, 2).reshape(b, g, f * c.l, n, d)
    return torch.cat([head[:, None].expand(b, g, c.cls, n, d), x], dim=2).flatten(0, 1)


def _back(c: Call, o: torch.Tensor) -> torch.Tensor:
    b, (n, d) = c.q.shape[0], o.shape[-2:]
    f, g = c.frames_per_group, c.t // c.frames_per_group
    if c.axis == "temporal":
        first = o.new_zeros(b, c.cls, n, d)
        o = o.reshape(b, g, c.l, f, n, d).transpose(2, 3).reshape(b, c.t, c.l, n, d)
    else:
        o = o.reshape(b, g, c.cls + f * c.l, n, d)
        first = o[:, :, : c.cls].mean(1)
        o = o[:, :, c.cls :].unflatten(2, (f, c.l)).transpose(1, 2).reshape(b, c.t, c.l, n, d)
    if c.order == "patch":
        o = o.transpose(1, 2)
    return torch.cat([first, o.reshape(b, c.t * c.l, n, d)], dim=1)


def _race(kernel: str, axis: str) -> room.Prepare:
    def prepared(problem: problems.Problem) -> problems.Call | None:
        c = prepare(**problem.kwargs)
        if c.axis != axis or c.rope is not None:
            return None

        def call() -> torch.Tensor:
            q, k, v = (_sequences(c, x) for x in (c.q, c.k, c.v))
            return _back(c, tokens_first(q, k, v, kernel, scale=c.scale))

        return call

    return prepared


for kernel in KERNELS:
    gpu = kernel in GPU_ONLY
    room.rival(f"permute + SDPA {kernel} + permute back", "divided_attention", gpu=gpu)(_race(kernel, "temporal"))
    room.rival(f"split + SDPA {kernel} + merge", "divided_attention", gpu=gpu)(_race(kernel, "spatial"))
