"""apply_rope and qkv_prologue as models write them: cos and sin given in the tensors' dtype, a pass per step; and the
same chain compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import rivals as room
from benchmarks.gpu.cases import Race
from benchmarks.gpu.rivals import generic
from vkernels.rope import RopeSpec


def _tables(spec: RopeSpec, pos: torch.Tensor, dtype: torch.dtype, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [b|1, s, 1, rotary size], each pair's value twice."""
    pos = pos if pos.dim() == 3 else pos[None, None] if pos.dim() == 1 else pos[:, None]
    axis = torch.tensor(spec.axis_rows[0], device=pos.device)
    freq = torch.tensor(spec.freq, device=pos.device, dtype=torch.float64)
    angle = pos.double()[axis.clamp(min=0)].permute(1, 2, 0) * torch.where(axis < 0, 0.0, freq)
    twice = angle.repeat_interleave(2, -1) if spec.layout == "pair" else torch.cat([angle, angle], -1)
    return (twice.cos() * spec.scale).to(dtype)[:, :, None], (twice.sin() * spec.scale).to(dtype)[:, :, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pair: bool) -> torch.Tensor:
    if pair:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + other * sin


def _plain(spec: RopeSpec | None, d: int) -> bool:
    return spec is not None and spec.layout in ("half", "pair") and len(spec.axis_rows) == 1 and spec.rotary_dim == d


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _chain(race: Race, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The chain for what most models do, None for the rest."""
    spec, pos = kwargs.get("spec"), kwargs.get("pos")
    if race.op == "apply_rope":
        q, k = kwargs["q"], kwargs["k"]
        plain = not {"inverse", "inplace", "angle"} & set(kwargs)
        if k is None or not plain or not _plain(spec, q.shape[-1]):
            return None
        cos, sin = _tables(spec, pos, q.dtype, q.shape[0])
        pair = spec.layout == "pair"
        return lambda: (_rotate(q, cos, sin, pair), _rotate(k, cos, sin, pair))
    n, m, qkv, bias = kwargs["n"], kwargs["m"], kwargs["qkv"], kwargs.get("bias")
    d = qkv.shape[-1] // (n + 2 * m)
    unusual = {"norm_order", "norm_scope", "norm_offset", "cache"} & set(kwargs)
    if unusual or not _plain(spec, d):
        return None
    cos, sin = _tables(spec, pos, qkv.dtype, qkv.shape[0])
    weights, eps = (kwargs.get("q_norm"), kwargs.get("k_norm")), kwargs.get("norm_eps", 1e-6)

    def run() -> tuple[torch.Tensor, ...]:
        row = qkv if bias is None else qkv + bias
        q, k, v = row.unflatten(-1, (n + 2 * m, d)).split([n, m, m], dim=2)
        q, k = (
            _rotate(_norm(x, w, eps), cos, sin, spec.layout == "pair") for x, w in zip((q, k), weights, strict=True)
        )
        return q, k, v.contiguous()

    return run


def rivals(race: Race, kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], room.Rival]]]:
    chain = _chain(race, kwargs)
    if chain is None:
        yield from generic.rivals(race, kwargs)
        return
    yield "eager, as models write it", lambda: room.Rival("eager, as models write it", chain)
    yield "the same, compiled", lambda: room.Rival("the same, compiled", room.compiled(chain))
