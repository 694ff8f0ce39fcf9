"""Cases by what they do: the keyword arguments of each op's public function, from the sizes a model would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import vkernels as vk
from vkernels.bench.case import Case
from vkernels.spec import Maker

FULL = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp32"}
Heads = int | tuple[int, int]  # of queries, of keys and values


def _both(heads: Heads) -> tuple[int, int]:
    return (heads, heads) if isinstance(heads, int) else heads


def attention(
    id: str, b: int, s: int, heads: Heads, d: int, mask: Callable[[], vk.VideoMask] | None = None, **more: Any
) -> Case:
    n, kv = _both(heads)

    def make(m: Maker) -> dict[str, Any]:
        q, k, v = (m.randn(b, s, x, d) for x in (n, kv, kv))
        return {"q": q, "k": k, "v": v, "mask": mask() if mask else None}

    return Case("attention", id, make, **more)


def divided(
    id: str, b: int, grid: vk.Grid, n: int, d: int, axis: str, cls: int = 0, order: str = "frame", **more
) -> Case:
    def make(m: Maker) -> dict[str, Any]:
        q, k, v = (m.randn(b, cls + grid.tokens, n, d) for _ in "qkv")
        return {"q": q, "k": k, "v": v, "grid": grid, "axis": axis, "cls": cls, "order": order}

    return Case("divided_attention", id, make, **more)


def rotation(id: str, s: int, heads: Heads, spec: vk.RopeSpec, pos: Callable[[], torch.Tensor], **more: Any) -> Case:
    """Of q and k; `inplace` among `more` is passed on."""
    inplace = {"inplace": True} if more.pop("inplace", False) else {}
    (n, kv), d = _both(heads), spec.rotary_dim

    def make(m: Maker) -> dict[str, Any]:
        return {"q": m.randn(1, s, n, d), "k": m.randn(1, s, kv, d), "spec": spec, "pos": pos().to(m.device), **inplace}

    return Case("apply_rope", id, make, **more)


def prologue(
    id: str,
    s: int,
    heads: Heads,
    spec: vk.RopeSpec,
    pos: Callable[[], torch.Tensor],
    norms: bool = False,
    bias: bool = False,
    cache: str | None = None,
    **more: Any,
) -> Case:
    """`cache`: "full" for one in the tensors' own dtype, or a scheme."""
    (n, kv), d = _both(heads), spec.rotary_dim

    def make(m: Maker) -> dict[str, Any]:
        given = {"qkv": m.randn(1, s, (n + 2 * kv) * d), "n": n, "m": kv, "spec": spec, "pos": pos().to(m.device)}
        if bias:
            given["bias"] = m.randn((n + 2 * kv) * d)
        if norms:
            given |= {name: m.randn(d) for name in ("q_norm", "k_norm")}
        if cache:
            scheme = FULL[m.dtype] if cache == "full" else cache
            given["cache"] = vk.KVCache(scheme, b=1, m=kv, d=d, capacity=s, dtype=m.dtype, device=m.device)
        return given

    return Case("qkv_prologue", id, make, **more)


def decode(id: str, scheme: str, heads: Heads, d: int, keys: int, b: int = 1, **more: Any) -> Case:
    """One token after `keys`; the cache says it holds them and is filled where it is used."""
    n, kv = _both(heads)

    def make(m: Maker) -> dict[str, Any]:
        own = FULL[m.dtype] if scheme == "full" else scheme
        cache = vk.KVCache(own, b=b, m=kv, d=d, capacity=keys, dtype=m.dtype, device=m.device)
        cache.advance(keys)
        return {"q": m.randn(b, 1, n, d), "cache": cache}

    return Case("decode_attention", id, make, **more)


def append(id: str, scheme: str, m_heads: int, d: int, tokens: int, **more: Any) -> Case:
    def make(m: Maker) -> dict[str, Any]:
        own = FULL[m.dtype] if scheme == "full" else scheme
        cache = vk.KVCache(own, b=1, m=m_heads, d=d, capacity=tokens, dtype=m.dtype, device=m.device)
        k, v = (m.randn(1, tokens, m_heads, d).to(cache.dtype) for _ in "kv")
        return {"cache": cache, "k": k, "v": v}

    return Case("kv_append", id, make, **more)


def move(id: str, shape: Sequence[int], plan: Callable[[], Any], **more: Any) -> Case:
    """`norm` among `more`: LayerNorm behind the move, with a weight and a bias."""
    norm = more.pop("norm", False)

    def make(m: Maker) -> dict[str, Any]:
        given = {"x": m.randn(*shape), "plan": plan()}
        if norm:
            given |= {"norm": "layer", "norm_weight": m.randn(shape[-1]), "norm_bias": m.randn(shape[-1])}
        return given

    return Case("rearrange", id, make, **more)


def lowering(id: str, mask: Callable[[], vk.VideoMask], visible: Callable[..., Any], **more: Any) -> Case:
    return Case("lower_mask", id, lambda m: {"mask": mask, "device": m.device}, visible=visible, **more)
