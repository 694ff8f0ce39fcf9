"""divided_attention on Triton: which kernels serve a call, and their launches.

Sequences that fit a tile are packed (triton_short.py); longer ones, and those that share a CLS token, take tiles of
queries over tiles of keys (triton_long.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vkernels.check import bind, require, same_dtype
from vkernels.library import unit_stride
from vkernels.ops.divided_attention import triton_cls, triton_long, triton_short
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
    rows = sizes["b"] * n * (t + 1) * (l + 1)
    require(rows < 2**30, NAME, "q", "have b*n*(t+1)*(l+1) below 2^30", rows)


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Batch, token and head strides of all tensors, in units of their common alignment, and that alignment."""
    found = [0 if x.shape[axis] == 1 else x.stride(axis) for x in tensors for axis in range(3)]
    align = alignment(found)
    return [stride // align for stride in found], align


def _extent(axes: Iterable[int], *tensors: Tensor) -> int:
    """How many elements lie between the first and the last along `axes`, at the most."""
    return max(sum(x.shape[axis] * x.stride(axis) for axis in axes) for x in tensors)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiles(kernel: str, q: Tensor) -> dict[str, int]:
    return tiles(NAME, kernel, arch(q.device), d=q.shape[3], bytes=q.element_size())


class _Call:
    """What the launches of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, scale: float, layout: list[int]):
        self.b, self.s, self.n, self.d = q.shape
        self.m = k.shape[2]
        self.like = q
        self.scale = scale
        self.where = sequences(layout)
        self.cls = bool(layout[2])
        self.shared = bool(layout[2] and layout[3])
        a, b = parts(self.d)
        self.head = {"D": self.d, "A": a, "B": b}
        self.meta = {**self.head, "PER_KEY": self.n // self.m, "RUNS": self.where.runs}

    @property
    def sequences(self) -> int:
        return self.b * self.where.count

    def fits(self, here: dict[str, int]) -> bool:
        """Whether whole sequences go into a tile, packed."""
        return not self.shared and self.where.length <= here["ROWS"]

    def scratch(self, heads: int, size: int) -> Tensor:
        """What every sequence leaves for the CLS, float32; next to nothing where it is not shared."""
        outer = self.where.outer if self.shared else 0
        return self.like.new_empty((self.b, heads, outer, size), dtype=torch.float32)

    def short(self, kernel: Any, heads: int, here: dict[str, int], *tensors: Tensor) -> None:
        strides, align = _strides(*tensors)
        where, wide = self.where, _extent(range(3), *tensors) >= 2**31
        packed = here["ROWS"] // max(where.length, 1)
        launch(
            kernel, (cdiv(self.sequences, packed) * heads,), *tensors, *strides,
            self.scale, heads, self.sequences, where.count, where.inner, where.length, *where.strides,
            WIDE=wide, CLS=self.cls, ALIGN=align, **self.meta, **here,
        )  # fmt: skip

    def long(self, kernel: Any, heads: int, slots: int, here: dict[str, int], tensors, *scratch: Tensor) -> None:
        strides, align = _strides(*tensors)
        where, wide = self.where, _extent((1,), *tensors) >= 2**31
        launch(
            kernel, (slots * heads * self.sequences,), *tensors, *scratch, *strides,
            self.scale, heads, slots, where.outer, where.inner, where.length, *where.strides,
            WIDE=wide, CLS=self.shared, ALIGN=align, **self.meta, **here,
        )  # fmt: skip

    def cls_rows(self, out: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> None:
        """The CLS rows of `out`: the sums of what the sequences left in `part`, or 0 where they leave nothing."""
        here = tiles(NAME, "_cls_sum_kernel", arch(out[0].device))
        count = self.where.outer * self.shared
        three = (0, len(out) - 2, -1)
        launch(
            triton_cls._cls_sum_kernel, (self.b * self.n, len(out)),
            *(part[i] for i in three), *(out[i] for i in three), self.s, self.b, self.n, self.m, count,
            **self.head, **here,
        )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int]) -> Tensor:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    _check(q, k, v, layout)
    call, o = _Call(q, k, scale, layout), _like(q)
    if call.sequences and call.fits(here := _tiles("_short_fwd_kernel", q)):
        call.short(triton_short._short_fwd_kernel, call.n, here, q, k, v, o)
        return o
    here = _tiles("_long_fwd_kernel", q)
    slots = cdiv(call.where.length, here["BLOCK_M"]) + call.shared
    part = call.scratch(call.n, call.d)
    call.long(triton_long._long_fwd_kernel, call.n, slots, here, (q, k, v, o), part)
    if call.cls:
        call.cls_rows((o,), (part,))
    return o


def backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_o, q, k, v = inputs = tuple(unit_stride(x) for x in (grad_o, q, k, v))
    _check(q, k, v, layout, grad_o)
    call, dq, dk, dv = _Call(q, k, scale, layout), _like(q), _like(k), _like(v)
    if call.sequences and call.fits(here := _tiles("_short_bwd_kernel", q)):
        call.short(triton_short._short_bwd_kernel, call.m, here, *inputs, dq, dk, dv)
        return dq, dk, dv

    n, m, d, length = call.n, call.m, call.d, call.where.length
    stats = q.new_empty((call.sequences, n, length, 2), dtype=torch.float32)
    cls_stats, *part = (call.scratch(*shape) for shape in ((n, 2), (n, d), (m, d), (m, d)))
    here = _tiles("_long_dq_kernel", q)
    slots = cdiv(length, here["BLOCK_M"]) + call.shared
    call.long(triton_long._long_dq_kernel, n, slots, here, (*inputs, dq), stats, cls_stats, part[0])
    here = _tiles("_long_dkv_kernel", q)
    slots = cdiv(length, here["BLOCK_N"]) + call.shared
    call.long(triton_long._long_dkv_kernel, m, slots, here, (*inputs, dk, dv), stats, cls_stats, *part[1:])
    if call.cls:
        call.cls_rows((dq, dk, dv), tuple(part))
    return dq, dk, dv
