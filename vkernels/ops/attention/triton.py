"""attention on Triton: what is launched, and what keeps the kernels inside their tensors.

Kernels: triton_forward.py, triton_backward.py. Pieces: vkernels/triton/{rows,visible,head,softmax,matmul}.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vkernels.check import FLOATS, bind, require, same_dtype
from vkernels.library import unit_stride
from vkernels.ops.attention.triton_backward import _attention_bounds_kernel, _attention_dkv_kernel, _attention_dq_kernel
from vkernels.ops.attention.triton_forward import _attention_fwd_kernel
from vkernels.remember import planned
from vkernels.triton.head import parts
from vkernels.triton.launch import alignment, arch, cdiv, launch
from vkernels.triton.rows import PACKED, TENSORS
from vkernels.triton.tiles import tiles

MAX_LENGTH = 2**30
MAX_RELATIONS = 4


def _covers(groups: int, length: int, group: int, token: int, tokens: int) -> bool:
    """Whether the strides name every token row exactly once: one of them is 1, the other steps over it."""
    if groups * length != tokens or not tokens:
        return groups * length == tokens
    return (
        (groups == 1 and (length == 1 or token == 1))
        or (length == 1 and group == 1)
        or (group == 1 and token == groups)
        or (token == 1 and group == length)
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: list[int], tensors: dict[str, Tensor | None], bounds: list[int]
) -> None:
    """What keeps the kernels inside their tensors, for callers who come past the public function. Values of index
    tensors cannot be looked at here; the kernels clamp them."""

    def must(condition: bool, argument: str, rule: str, value: Any) -> None:
        require(condition, "attention", argument, rule, value)

    axes = bind("attention", ("q", q, "b s_q n d"), ("k", k, "b s_k m d"), ("v", v, "b s_k m d"))
    same_dtype("attention", ("q", q), ("k", k), ("v", v))
    must(q.dtype in FLOATS, "q", "have dtype float32, bfloat16, float16", q.dtype)
    b, s_q, s_k, n, m = (axes[name] for name in ("b", "s_q", "s_k", "n", "m"))
    must(1 <= axes["d"] <= 256, "q", "have a head size from 1 to 256", axes["d"])
    must(max(s_q, s_k) <= MAX_LENGTH, "q", "have at most 2^30 tokens", max(s_q, s_k))
    must(n % m == 0 if m else n == 0, "q", f"have a multiple of the {m} key heads as heads", n)
    must(len(layout) == 7, "layout", "hold 7 numbers", len(layout))
    groups, len_q, len_k, *strides = layout
    must(min(groups, len_q, len_k) >= 0, "layout", "hold sizes of at least 0", layout)
    for name, rows, length, tokens, (group, token) in (
        ("q_rows", tensors["q_rows"], len_q, s_q, strides[:2]),
        ("k_rows", tensors["k_rows"], len_k, s_k, strides[2:]),
    ):
        if rows is None:
            must(_covers(groups, length, group, token, tokens), "layout", "cover every token row exactly once", layout)
            must(tensors[name[0] + "_count"] is None, name[0] + "_count", f"come with {name}", "no row map")
        else:
            must((groups, length) == (1, tokens), "layout", "be one group where rows are mapped", layout)
    must((tensors["q_attr"] is None) == (tensors["k_attr"] is None), "k_attr", "be given with q_attr", "one of them")
    ranges, attributes = tensors["ranges"], tensors["q_attr"]
    intervals = 2 if ranges is None else ranges.shape[-1]
    must(intervals in (2, 4, 6), "ranges", "hold 1 to 3 intervals per query", intervals)
    relations = 0 if attributes is None else attributes.shape[1]
    fits = len(bounds) == 2 * relations <= 2 * MAX_RELATIONS
    must(fits, "bounds", f"hold a pair per attribute, at most {MAX_RELATIONS}", len(bounds))
    must(all(-MAX_LENGTH <= x <= MAX_LENGTH for x in bounds), "bounds", "lie within 2^30 of zero", bounds)
    for name, shape in zip(
        TENSORS,
        ((s_q,), (s_k,), (), (), (len_q, intervals), (relations, len_q), (relations, len_k), (len_q,), (len_k,)),
        strict=True,
    ):
        x = tensors[name]
        if x is None:
            continue
        dtype = torch.uint8 if name.endswith("global") else torch.int32
        good = tuple(x.shape[1:]) == shape and x.dim() == len(shape) + 1 and x.shape[0] in (1, b)
        must(good, name, f"have shape (b|1, {', '.join(map(str, shape))})", tuple(x.shape))
        must(x.dtype == dtype, name, f"have dtype {dtype}", x.dtype)
        must(x.device == q.device, name, f"be on the device of q ({q.device})", x.device)


class _Problem:
    """One call as both directions see it: checked inputs, and the arguments every kernel starts with. It keeps what
    they look like, and gives `tensors` of such calls back in the order kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: list[int], *mask: Any):
        *rows, bounds, q_global, k_global = mask
        tensors = dict(zip(TENSORS, (*rows, q_global, k_global), strict=True))
        _check(q, k, v, layout, tensors, bounds)
        self.b, self.s_q, self.n, d = q.shape
        self.s_k, self.m = k.shape[1:3]
        self.groups, self.len_q, self.len_k, *self.strides = layout
        given = list(enumerate(tensors.values()))
        self.form = sum(1 << bit for bit, x in given if x is not None)
        self.per_sample = sum(1 << bit for bit, x in given if x is not None and x.shape[0] > 1)
        ranges = tensors["ranges"]
        self.intervals = 0 if ranges is None else ranges.shape[-1] // 2
        self.bounds = [*bounds, *[0] * (2 * MAX_RELATIONS - len(bounds))]
        self.row: dict[str, Any] = {"arch": arch(q.device), "d": d, "bytes": q.element_size()}
        a, b = parts(d, widest=128)
        self.meta: dict[str, Any] = {"R": self.intervals, "RELATIONS": len(bounds) // 2, "D": d, "A": a, "B": b}

    def tiles(self, kernel: str) -> dict[str, int]:
        return tiles("attention", kernel, **self.row)

    def cut(self, block: int, keys: bool = False) -> tuple[int, int, int, int]:
        """(form, groups, tiles of a group, rows of a tile) with tiles of `block` queries, or keys. Groups that fit a
        tile more than once are packed: whole groups share it."""
        length = self.len_k if keys else self.len_q
        if self.groups > 1 and 0 < 2 * max(self.len_q, self.len_k) <= block:
            step = block // max(length, 1) * max(length, 1)
            return self.form + PACKED.value, 1, cdiv(self.groups * length, step), step
        return self.form, self.groups, cdiv(length, block), block

    def numbers(self, groups: int) -> list[Any]:
        """What follows the mask's tensors, up to the scale, for kernels that see `groups` groups: packed ones are 1."""
        times = self.groups // max(groups, 1)
        return [
            self.per_sample, self.n, self.n // max(self.m, 1), self.s_q, self.s_k, self.len_q, self.len_k,
            times * self.len_q, times * self.len_k, groups, *self.strides, *self.bounds,
        ]  # fmt: skip


def _tensors(q: Tensor, q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, bounds, *globals_) -> list[Tensor]:
    """The mask's tensors in the order of TENSORS; q stands where nothing is read."""
    given = (q_rows, k_rows, q_count, k_count, ranges, q_attr, k_attr, *globals_)
    return [q if x is None else x.contiguous() for x in given]


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Batch, token and head strides in units of what divides them all, and that unit."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    align = alignment(strides)
    return [stride // align for stride in strides], align


@planned
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int], *mask: Any) -> Callable[..., Any]:
    p = _Problem(q, k, v, layout, *mask)
    here = p.tiles("_attention_fwd_kernel")
    form, groups, count, step = p.cut(here["BLOCK_M"])
    strides, align = _strides(*map(unit_stride, (q, k, v)))
    grid = (p.b * p.n * groups * count,)
    numbers, lse_shape = p.numbers(groups), (p.b, p.n, p.s_q)
    meta = {**p.meta, "FORM": form, "ALIGN": align, **here}

    def run(q, k, v, scale, layout, *mask) -> tuple[Tensor, Tensor]:
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(lse_shape, dtype=torch.float32)
        launch(
            _attention_fwd_kernel, grid, q, k, v, out, lse, *strides, *_tensors(q, *mask), *numbers, scale,
            count, step, **meta,
        )  # fmt: skip
        return out, lse

    return run


@planned
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    layout: list[int], *mask: Any,
) -> Callable[..., Any]:  # fmt: skip
    p = _Problem(q, k, v, layout, *mask)
    bind("attention", ("q", q, "b s n d"), ("dout", dout, "b s n d"), ("out", out, "b s n d"))
    bind("attention", ("q", q.transpose(1, 2), "b n s d"), ("lse", lse, "b n s"), ("dlse", dlse, "b n s"))
    same_dtype("attention", ("q", q), ("dout", dout), ("out", out))
    for name, x in (("lse", lse), ("dlse", dlse)):
        good = x is None or x.dtype == torch.float32
        require(good, "attention", name, "have dtype float32", None if x is None else x.dtype, TypeError)
    strides, align = _strides(*map(unit_stride, (q, k, v, dout)))
    by_queries = _by_queries(p, strides, align)
    by_keys = _by_keys(p, strides, align)

    def run(dout, dlse, q, k, v, out, lse, scale, layout, *mask) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(dout)
        out, lse = out.contiguous(), lse.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        delta = torch.empty_like(lse)
        tensors = _tensors(q, *mask)
        by_queries(q, k, v, dout, out, lse, dlse, delta, dq, tensors, scale)
        by_keys(q, k, v, dout, lse, delta, dk, dv, tensors, scale)
        return dq, dk, dv

    return run


def _by_queries(p: _Problem, strides: list[int], align: int) -> Callable[..., None]:
    """The launch that leaves dq, and delta for the one over keys."""
    here = p.tiles("_attention_dq_kernel")
    form, groups, count, step = p.cut(here["BLOCK_M"])
    grid, numbers = (p.b * p.n * groups * count,), p.numbers(groups)
    meta = {**p.meta, "FORM": form, "ALIGN": align, **here}

    def run(q, k, v, dout, out, lse, dlse, delta, dq, tensors, scale) -> None:
        launch(
            _attention_dq_kernel, grid, q, k, v, dout, out, lse, dlse, delta, dq, *strides, *tensors, *numbers, scale,
            count, step, **meta,
        )  # fmt: skip

    return run


def _by_keys(p: _Problem, strides: list[int], align: int) -> Callable[..., None]:
    """The launch that leaves dk and dv; where there are ranges, one before it that bounds them tile by tile."""
    here = p.tiles("_attention_dkv_kernel")
    form, groups, count, step = p.cut(here["BLOCK_N"], keys=True)
    q_tiles, bounded = cdiv(p.len_q, here["BLOCK_M"]), p.intervals > 0 and form < PACKED.value
    per_sample = p.per_sample
    each = bounded and per_sample & 0b11100 != 0  # q_count, k_count or ranges
    samples = p.b if each else 1
    grid, numbers = (p.b * p.m * groups * count,), p.numbers(groups)
    numbers[0] = per_sample | each << 9
    meta = {**p.meta, "FORM": form, "ALIGN": align, **here}
    m, intervals = p.m, p.intervals
    bounds_shape, bounds_grid = (samples, intervals, 4, q_tiles), (samples * intervals * q_tiles,)
    bounds_numbers = (numbers[0], p.len_q, p.len_k, q_tiles)
    bounds_meta = {"R": intervals, "FORM": form, "BLOCK_M": here["BLOCK_M"]}
    if bounded:
        bounds_meta |= p.tiles("_attention_bounds_kernel")

    def run(q, k, v, dout, lse, delta, dk, dv, tensors, scale) -> None:
        bounds = delta
        if bounded:
            bounds = q.new_empty(bounds_shape, dtype=torch.int32)
            ranges, q_count, k_count = tensors[4], tensors[2], tensors[3]
            launch(
                _attention_bounds_kernel, bounds_grid, ranges, q_count, k_count, bounds, *bounds_numbers, **bounds_meta
            )
        launch(
            _attention_dkv_kernel, grid, q, k, v, dout, lse, delta, bounds, dk, dv, m, q_tiles, *strides, *tensors,
            *numbers, scale, count, step, **meta,
        )  # fmt: skip

    return run
