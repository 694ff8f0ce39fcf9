"""apply_rope and qkv_prologue as models write them: cos and sin given in the tensors' dtype, a pass per step; and the
same chain compiled."""

from __future__ import annotations

from typing import Any

import torch

from vkernels.bench import rivals as room
from vkernels.bench.problem import Call, Problem
from vkernels.rope import RopeSpec


def _tables(spec: RopeSpec, pos: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
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


def _plain_call(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("k") is not None and not {"inverse", "angle"} & set(kwargs)


def _rotation(problem: Problem) -> Call | None:
    q, k, spec, pos = problem.given("q", "k", "spec", "pos")
    if not _plain_call(problem.kwargs) or not _plain(spec, q.shape[-1]):
        return None
    cos, sin = _tables(spec, pos, q.dtype)
    pair = spec.layout == "pair"
    return lambda: (_rotate(q, cos, sin, pair), _rotate(k, cos, sin, pair))


def _prologue(problem: Problem) -> Call | None:
    kwargs = problem.kwargs
    n, m, qkv, bias, cache, spec, pos = problem.given("n", "m", "qkv", "bias", "cache", "spec", "pos")
    d = qkv.shape[-1] // (n + 2 * m)
    unusual = {"norm_order", "norm_scope", "norm_offset"} & set(kwargs)
    if (
        unusual
        or not _plain(spec, d)
        or (cache is not None and (cache.bits or cache.paged or cache.length() or cache.page != qkv.shape[1]))
    ):
        return None
    cos, sin = _tables(spec, pos, qkv.dtype)
    weights, eps = (kwargs.get("q_norm"), kwargs.get("k_norm")), kwargs.get("norm_eps", 1e-6)
    b, s = qkv.shape[:2]
    index = torch.arange(s, device=qkv.device)
    stored = [qkv.new_zeros(b, m, s, d) for _ in "kv"] if cache is not None else []

    def run() -> Any:
        row = qkv if bias is None else qkv + bias
        q, k, v = row.unflatten(-1, (n + 2 * m, d)).split([n, m, m], dim=2)
        q, k = (
            _rotate(_norm(x, w, eps), cos, sin, spec.layout == "pair") for x, w in zip((q, k), weights, strict=True)
        )
        if not stored:
            return q, k, v.contiguous()
        for rows, x in zip(stored, (k, v), strict=True):
            rows.index_copy_(2, index, x.transpose(1, 2))
        return q, *stored

    return run


def chain(problem: Problem) -> Call | None:
    """The chain for what most models do, None for the rest."""
    return _rotation(problem) if problem.op == "apply_rope" else _prologue(problem)


@room.rival("Hugging Face eager", "apply_rope", "qkv_prologue")
def eager(problem: Problem) -> Call | None:
    return chain(problem)


@room.rival("Hugging Face eager, compiled", "apply_rope", "qkv_prologue", compiles=True)
def fast(problem: Problem) -> Call | None:
    call = chain(problem)
    return call and room.compiled(call)


@room.rival("liger-kernel", "apply_rope", gpu=True)
def liger(problem: Problem) -> Call | None:
    q, k, spec, pos = problem.given("q", "k", "spec", "pos")
    if not _plain_call(problem.kwargs) or not _plain(spec, q.shape[-1]) or spec.layout != "half":
        return None
    room.needs("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    cos, sin = (table[:, :, 0] for table in _tables(spec, pos, q.dtype))

    def call() -> Any:
        return tuple(x.transpose(1, 2) for x in liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin))

    return call
