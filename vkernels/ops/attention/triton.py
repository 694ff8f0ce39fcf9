"""attention on Triton: what is launched, and what keeps the kernels inside their tensors.

Kernels: triton_forward.py, triton_backward.py. Pieces: vkernels/triton/{rows,visible,head,softmax,matmul}.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.check import FLOATS, bind, require, same_dtype
from vkernels.library import unit_stride
from vkernels.ops.attention.triton_backward import _attention_bounds_kernel, _attention_dkv_kernel, _attention_dq_kernel
from vkernels.ops.attention.triton_forward import _attention_fwd_kernel
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
    """One call as both directions see it: checked inputs, and the arguments every kernel starts with."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layout: list[int], *mask: Any):
        *rows, bounds, q_global, k_global = mask
        tensors = dict(zip(TENSORS, (*rows, q_global, k_global), strict=True))
        _check(q, k, v, layout, tensors, bounds)
        self.q, self.k, self.v = (unit_stride(x) for x in (q, k, v))
        self.scale = scale
        self.groups, self.len_q, self.len_k, *self.strides = layout
        given = list(enumerate(tensors.values()))
        self.form = sum(1 << bit for bit, x in given if x is not None)
        self.per_sample = sum(1 << bit for bit, x in given if x is not None and x.shape[0] > 1)
        self.tensors = [q if x is None else x.contiguous() for _, x in given]  # q stands where nothing is read
        ranges = tensors["ranges"]
        self.intervals = 0 if ranges is None else ranges.shape[-1] // 2
        self.bounds = [*bounds, *[0] * (2 * MAX_RELATIONS - len(bounds))]
        d = q.shape[-1]
        a, b = parts(d)
        self.meta: dict[str, Any] = {"R": self.intervals, "RELATIONS": len(bounds) // 2, "D": d, "A": a, "B": b}

    def tiles(self, kernel: str) -> dict[str, int]:
        q = self.q
        return tiles("attention", kernel, arch(q.device), d=q.shape[-1], bytes=q.element_size())

    def cut(self, block: int, keys: bool = False) -> tuple[int, int, int, int]:
        """(form, groups, tiles of a group, rows of a tile) with tiles of `block` queries, or keys. Groups that fit a
        tile more than once are packed: whole groups share it."""
        length = self.len_k if keys else self.len_q
        if self.groups > 1 and 0 < 2 * max(self.len_q, self.len_k) <= block:
            step = block // max(length, 1) * max(length, 1)
            return self.form + PACKED.value, 1, cdiv(self.groups * length, step), step
        return self.form, self.groups, cdiv(length, block), block

    def arguments(self, groups: int) -> list[Any]:
        """From q_rows to scale, for kernels that see `groups` groups: packed ones are 1."""
        s_q, n = self.q.shape[1:3]
        s_k, m = self.k.shape[1:3]
        times = self.groups // max(groups, 1)
        return [
            *self.tensors, self.per_sample, n, n // max(m, 1), s_q, s_k, self.len_q, self.len_k,
            times * self.len_q, times * self.len_k, groups, *self.strides, *self.bounds, self.scale,
        ]  # fmt: skip


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Batch, token and head strides in units of what divides them all, and that unit."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    align = alignment(strides)
    return [stride // align for stride in strides], align


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *mask: Any) -> tuple[Tensor, Tensor]:
    p = _Problem(q, k, v, scale, *mask)
    b, s_q, n, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, n, s_q), dtype=torch.float32, device=q.device)
    here = p.tiles("_attention_fwd_kernel")
    form, groups, count, step = p.cut(here["BLOCK_M"])
    strides, align = _strides(p.q, p.k, p.v)
    launch(
        _attention_fwd_kernel, (b * n * groups * count,),
        p.q, p.k, p.v, out, lse, *strides, *p.arguments(groups), count, step,
        **p.meta, FORM=form, ALIGN=align, **here,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *mask: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    p = _Problem(q, k, v, scale, *mask)
    bind("attention", ("q", q, "b s n d"), ("dout", dout, "b s n d"), ("out", out, "b s n d"))
    bind("attention", ("q", q.transpose(1, 2), "b n s d"), ("lse", lse, "b n s"), ("dlse", dlse, "b n s"))
    same_dtype("attention", ("q", q), ("dout", dout), ("out", out))
    for name, x in (("lse", lse), ("dlse", dlse)):
        good = x is None or x.dtype == torch.float32
        require(good, "attention", name, "have dtype float32", None if x is None else x.dtype, TypeError)
    b, n, m = q.shape[0], q.shape[2], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout, out, lse = unit_stride(dout), out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    strides, align = _strides(p.q, p.k, p.v, dout)

    here = p.tiles("_attention_dq_kernel")
    form, groups, count, step = p.cut(here["BLOCK_M"])
    launch(
        _attention_dq_kernel, (b * n * groups * count,),
        p.q, p.k, p.v, dout, out, lse, dlse, delta, dq, *strides, *p.arguments(groups), count, step,
        **p.meta, FORM=form, ALIGN=align, **here,
    )  # fmt: skip

    here = p.tiles("_attention_dkv_kernel")
    form, groups, count, step = p.cut(here["BLOCK_N"], keys=True)
    q_tiles, bounds = cdiv(p.len_q, here["BLOCK_M"]), delta
    if p.intervals and form < PACKED.value:
        each = p.per_sample & 0b11100 != 0  # q_count, k_count or ranges
        samples = b if each else 1
        p.per_sample |= each << 9
        bounds = torch.empty((samples, p.intervals, 4, q_tiles), dtype=torch.int32, device=q.device)
        ranges, q_count, k_count = (p.tensors[TENSORS.index(name)] for name in ("ranges", "q_count", "k_count"))
        launch(
            _attention_bounds_kernel, (samples * p.intervals * q_tiles,),
            ranges, q_count, k_count, bounds, p.per_sample, p.len_q, p.len_k, q_tiles,
            R=p.intervals, FORM=form, BLOCK_M=here["BLOCK_M"], **p.tiles("_attention_bounds_kernel"),
        )  # fmt: skip
    launch(
        _attention_dkv_kernel, (b * m * groups * count,),
        p.q, p.k, p.v, dout, lse, delta, bounds, dk, dv, m, q_tiles, *strides, *p.arguments(groups), count, step,
        **p.meta, FORM=form, ALIGN=align, **here,
    )  # fmt: skip
    return dq, dk, dv
