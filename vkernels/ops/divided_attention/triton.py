"""divided_attention on Triton: which kernels serve a call, and their launches.

Sequences that fit a tile are packed (triton_short.py); longer ones, and those that share a CLS token, take tiles of
queries over tiles of keys (triton_long.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vkernels.check import bind, require, same_dtype
from vkernels.library import unit_stride
from vkernels.ops.divided_attention import triton_long, triton_short
from vkernels.triton.head import parts
from vkernels.triton.launch import alignment, arch, cdiv, launch
from vkernels.triton.sequences import Sequences
from vkernels.triton.tiles import tiles

NAME = "divided_attention"


def sequences(layout: list[int]) -> Sequences:
    """[t, l, cls, spatial, patch-major, frames per group] as token rows."""
    t, l, cls, spatial, patch_major, frames = layout  # noqa: E741
    frame, patch = (1, t) if patch_major else (l, 1)
    groups = t // frames
    if spatial:  # frames a whole number of groups apart
        return Sequences(cls, groups, 1, frames * l, max(l, 1), frame, 0, groups * frame, patch)
    return Sequences(cls, groups, l, frames, frames, frames * frame, patch, 0, frame)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: list[int], grad_o: Tensor | None = None) -> None:
    """What keeps the kernels inside their tensors, for callers who come past the public function."""
    like = (("grad_o", grad_o),) if grad_o is not None else ()
    bound = (("q", q, "b s n d"), ("k", k, "b s m d"), ("v", v, "b s m d"))
    sizes = bind(NAME, *bound, *((name, x, "b s n d") for name, x in like))
    same_dtype(NAME, ("q", q), ("k", k), ("v", v), *like)
    n, m, d = sizes["n"], sizes["m"], sizes["d"]
    require(m >= 1 and n >= m and n % m == 0, NAME, "q", "have a multiple of the heads of k", f"n={n} m={m}")
    require(d % 8 == 0 and 8 <= d <= 256, NAME, "q", "have a head size that is a multiple of 8 up to 256", d)
    require(len(layout) == 6, NAME, "layout", "hold 6 numbers", layout)
    t, l, cls, _, _, frames = layout  # noqa: E741
    good = t >= 0 and l >= 0 and cls in (0, 1) and frames >= 1 and t % frames == 0
    require(good, NAME, "layout", "name frames, patches, a CLS token or none, and frames that divide them", layout)
    require(cls + t * l == sizes["s"], NAME, "q", f"have cls + t*l = {cls + t * l} tokens", sizes["s"])
    require(sizes["b"] * sizes["s"] * n < 2**31, NAME, "q", "have less than 2^31 rows", sizes["b"] * sizes["s"] * n)


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Batch, token and head strides of all tensors, in units of their common alignment, and that alignment."""
    found = [0 if x.shape[axis] == 1 else x.stride(axis) for x in tensors for axis in range(3)]
    align = alignment(found)
    return [stride // align for stride in found], align


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _shared(layout: list[int]) -> bool:
    return bool(layout[2] and layout[3])


def _tiles(kernel: str, q: Tensor) -> dict[str, int]:
    return tiles(NAME, kernel, arch(q.device), d=q.shape[3], bytes=q.element_size())


def _short(kernel: Any, tensors: tuple[Tensor, ...], heads: int, per_key: int, here, scale, layout, where) -> None:
    b, _, _, d = tensors[0].shape
    strides, align = _strides(*tensors)
    a, rest = parts(d)
    launch(
        kernel, (cdiv(b * where.count, here["ROWS"] // where.length) * heads,),
        *tensors, *strides, scale, heads, b * where.count, where.count, where.inner, where.length, *where.strides,
        PER_KEY=per_key, RUNS=where.runs, CLS=layout[2], D=d, A=a, B=rest, ALIGN=align, **here,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int]) -> Tensor:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    _check(q, k, v, layout)
    o = _like(q)
    n, m = q.shape[2], k.shape[2]
    where = sequences(layout)
    here = _tiles("_short_fwd_kernel", q)
    _short(triton_short._short_fwd_kernel, (q, k, v, o), n, n // m, here, scale, layout, where)
    return o


def backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_o, q, k, v = (unit_stride(x) for x in (grad_o, q, k, v))
    _check(q, k, v, layout, grad_o)
    n, m = q.shape[2], k.shape[2]
    dq, dk, dv = _like(q), _like(k), _like(v)
    where = sequences(layout)
    here = _tiles("_short_bwd_kernel", q)
    _short(triton_short._short_bwd_kernel, (grad_o, q, k, v, dq, dk, dv), m, n // m, here, scale, layout, where)
    return dq, dk, dv
