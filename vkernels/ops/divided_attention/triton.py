"""divided_attention on Triton: which kernels serve a call, and their launches.

Sequences that fit a tile are packed (triton_short.py); longer ones, and those that share a CLS token, take tiles of
queries over tiles of keys (triton_long.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vkernels.check import bind, require, same_dtype
from vkernels.library import unit_stride
from vkernels.ops.divided_attention import triton_cls, triton_long, triton_short
from vkernels.ops.divided_attention.torch_op import refuse_angles
from vkernels.remember import planned
from vkernels.triton.head import parts
from vkernels.triton.launch import alignment, arch, blueprint, cdiv, launch
from vkernels.triton.sequences import Sequences
from vkernels.triton.tiles import tiles

NAME = "divided_attention"
Run = Callable[..., Any]


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


class _Plan:
    """What the launches of a call have in common, and those launches, planned: given the scale and the tensors that
    have come to be, each runs."""

    def __init__(self, q: Tensor, k: Tensor, layout: list[int]):
        self.b, self.s, self.n, self.d = q.shape
        self.m = k.shape[2]
        self.chip = arch(q.device)
        self.where = sequences(layout)
        self.cls = bool(layout[2])
        self.shared = bool(layout[2] and layout[3])
        a, b = parts(self.d, widest=256 // q.element_size())
        self.head = {"D": self.d, "A": a, "B": b}
        self.meta = {**self.head, "PER_KEY": self.n // self.m, "RUNS": self.where.runs}

    @property
    def sequences(self) -> int:
        return self.b * self.where.count

    def fits(self, here: dict[str, int]) -> bool:
        """Whether whole sequences go into a tile, packed."""
        return self.sequences > 0 and not self.shared and self.where.length <= here["ROWS"]

    def scratch(self, heads: int, size: int) -> tuple[int, ...]:
        """The shape of what every sequence leaves for the CLS, float32; next to nothing where it is not shared."""
        return self.b, heads, self.where.outer if self.shared else 0, size

    def short(self, kernel: Any, heads: int, here: dict[str, int], *tensors: Tensor) -> Run:
        strides, align = _strides(*tensors)
        where = self.where
        grid = (cdiv(self.sequences, here["ROWS"] // max(where.length, 1)) * heads,)
        numbers = (heads, self.sequences, where.count, where.inner, where.length, *where.strides)
        wide = _extent(range(3), *tensors) >= 2**31
        meta = {"WIDE": wide, "CLS": self.cls, "ALIGN": align, **self.meta, **here}

        def run(scale: float, *tensors: Tensor) -> None:
            launch(kernel, grid, *tensors, *strides, scale, *numbers, **meta)

        return run

    def long(self, kernel: Any, heads: int, block: str, here: dict[str, int], *tensors: Tensor) -> Run:
        """`tensors` are those with tokens; the launch takes scratch after them."""
        strides, align = _strides(*tensors)
        where = self.where
        slots = cdiv(where.length, here[block]) + self.shared
        grid = (slots * heads * self.sequences,)
        numbers = (heads, slots, where.outer, where.inner, where.length, *where.strides)
        wide = _extent((1,), *tensors) >= 2**31
        meta = {"WIDE": wide, "CLS": self.shared, "ALIGN": align, **self.meta, **here}

        def run(scale: float, *tensors: Tensor) -> None:
            launch(kernel, grid, *tensors, *strides, scale, *numbers, **meta)

        return run

    def cls_rows(self, outputs: int) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
        """The CLS rows of outputs: the sums of what the sequences left in `part`, or 0 where they leave nothing."""
        if not self.cls:
            return lambda out, part: None
        numbers = self.s, self.b, self.n, self.m, self.where.outer * self.shared
        meta = {**self.head, **tiles(NAME, "_cls_sum_kernel", self.chip)}
        grid, three = (self.b * self.n, outputs), (0, outputs - 2, -1)

        def run(out: Sequence[Tensor], part: Sequence[Tensor]) -> None:
            launch(
                triton_cls._cls_sum_kernel, grid, *[part[i] for i in three], *[out[i] for i in three], *numbers, **meta
            )

        return run


@planned
def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int], angles: Tensor | None = None, *neighbours: bool
) -> Run:
    refuse_angles(angles)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    _check(q, k, v, layout)
    plan, here = _Plan(q, k, layout), _tiles("_short_fwd_kernel", q)
    if plan.fits(here):
        short = plan.short(triton_short._short_fwd_kernel, plan.n, here, q, k, v, blueprint(q))

        def run_short(q, k, v, scale, layout, *unturned) -> Tensor:
            o = _like(q)
            short(scale, unit_stride(q), unit_stride(k), unit_stride(v), o)
            return o

        return run_short
    here = _tiles("_long_fwd_kernel", q)
    long = plan.long(triton_long._long_fwd_kernel, plan.n, "BLOCK_M", here, q, k, v, blueprint(q))
    cls_rows, scratch = plan.cls_rows(1), plan.scratch(plan.n, plan.d)

    def run(q, k, v, scale, layout, *unturned) -> Tensor:
        o, part = _like(q), q.new_empty(scratch, dtype=torch.float32)
        long(scale, unit_stride(q), unit_stride(k), unit_stride(v), o, part)
        cls_rows((o,), (part,))
        return o

    return run


@planned
def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layout: list[int],
    angles: Tensor | None = None,
    *neighbours: bool,
) -> Run:
    refuse_angles(angles)
    grad_o, q, k, v = inputs = tuple(unit_stride(x) for x in (grad_o, q, k, v))
    _check(q, k, v, layout, grad_o)
    plan, here = _Plan(q, k, layout), _tiles("_short_bwd_kernel", q)
    dq, dk, dv = map(blueprint, (q, k, v))
    if plan.fits(here):
        short = plan.short(triton_short._short_bwd_kernel, plan.m, here, *inputs, dq, dk, dv)

        def run_short(grad_o, q, k, v, scale, layout, *unturned) -> tuple[Tensor, ...]:
            grads = _like(q), _like(k), _like(v)
            short(scale, *map(unit_stride, (grad_o, q, k, v)), *grads)
            return grads

        return run_short

    n, m, d = plan.n, plan.m, plan.d
    stats_shape = (plan.sequences, n, plan.where.length, 2)
    scratch = [plan.scratch(*shape) for shape in ((n, 2), (n, d), (m, d), (m, d))]
    here = _tiles("_long_dq_kernel", q)
    by_queries = plan.long(triton_long._long_dq_kernel, n, "BLOCK_M", here, *inputs, dq)
    here = _tiles("_long_dkv_kernel", q)
    by_keys = plan.long(triton_long._long_dkv_kernel, m, "BLOCK_N", here, *inputs, dk, dv)
    cls_rows = plan.cls_rows(3)

    def run(grad_o, q, k, v, scale, layout, *unturned) -> tuple[Tensor, ...]:
        dq, dk, dv = grads = _like(q), _like(k), _like(v)
        inputs = [unit_stride(x) for x in (grad_o, q, k, v)]
        stats = q.new_empty(stats_shape, dtype=torch.float32)
        cls_stats, *part = [q.new_empty(shape, dtype=torch.float32) for shape in scratch]
        by_queries(scale, *inputs, dq, stats, cls_stats, part[0])
        by_keys(scale, *inputs, dk, dv, stats, cls_stats, *part[1:])
        cls_rows(grads, part)
        return grads

    return run
