"""apply_rope on Triton: angles once per token, shared by every head of q and k; one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import FLOATS, bind, require, same_dtype
from vkernels.library import unit_stride
from vkernels.remember import planned
from vkernels.triton.launch import alignment, arch, blueprint, cdiv, launch, power_of_2
from vkernels.triton.rotate import load_pairs, position_angles, store_pairs, table
from vkernels.triton.tiles import tiles


@triton.jit
def _turn_heads(
    x_ptr, out_ptr, stride_xb, stride_xs, stride_xn, stride_ob, stride_os, stride_on,
    sample, token, live, first, heads, c0, s0, c1, s1, pair, rest,
    OFFSET: tl.constexpr, PAIRS: tl.constexpr, HELD: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_REST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rotate heads first .. first + heads of a block of tokens, and copy what of them does not turn.

    Strides are in units of ALIGN elements; `sample` and `token` are 64 bits wide, and so is every offset."""
    x_row = ((sample * stride_xb + token * stride_xs) * ALIGN)[:, None, None]
    out_row = ((sample * stride_ob + token * stride_os) * ALIGN)[:, None, None]
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        inside = live[:, None, None] & (head < heads)[None, :, None]
        wide = (first + head).to(tl.int64)
        x_at = x_row + (wide * stride_xn * ALIGN)[None, :, None]
        out_at = out_row + (wide * stride_on * ALIGN)[None, :, None]
        x0, x1 = load_pairs(x_ptr, x_at + OFFSET, inside, pair, HELD, R, BLOCKS)
        y0 = x0 * c0[:, None, :] - x1 * s0[:, None, :]
        y1 = x1 * c1[:, None, :] + x0 * s1[:, None, :]
        if HELD > PAIRS:
            y0 = tl.where((pair < PAIRS)[None, None, :], y0, x0)
            y1 = tl.where((pair < PAIRS)[None, None, :], y1, x1)
        store_pairs(out_ptr, out_at + OFFSET, y0, y1, inside, pair, HELD, R, BLOCKS)
        if HAS_REST:
            still = inside & ((rest < OFFSET) | (rest >= OFFSET + 2 * PAIRS))
            x = tl.load(x_ptr + x_at + rest, mask=still, other=0.0)
            tl.store(out_ptr + out_at + rest, x, mask=still)


# What grows with the number of tokens must not be specialised on, or every length would compile anew.
@triton.jit(
    do_not_specialize=["tokens", "s", "stride_pa", "stride_pb", "stride_cb", "stride_cm", "stride_sb", "stride_sm"]
)
def _apply_rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, pos_ptr, axis_ptr, freq_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qs, stride_qn, stride_kb, stride_ks, stride_kn,
    stride_qob, stride_qos, stride_qon, stride_kob, stride_kos, stride_kon,
    stride_pa, stride_pb, stride_ps, axes, stride_cb, stride_cs, stride_cm, stride_sb, stride_ss, stride_sm,
    tokens, s, n, m, scale, sign,
    ROWS: tl.constexpr, D: tl.constexpr, OFFSET: tl.constexpr, PAIRS: tl.constexpr, HELD: tl.constexpr,
    BLOCKS: tl.constexpr, TABLE: tl.constexpr, APART: tl.constexpr, HAS_K: tl.constexpr, HAS_REST: tl.constexpr,
    R: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    live = row < tokens
    sample, token = row // s, row % s
    pair = tl.arange(0, R)
    rest = tl.arange(0, BLOCK_D)
    rest = tl.where(rest < D, rest, OFFSET)  # past the head: a column that turns, never copied
    for spec_row in tl.static_range(ROWS):
        if TABLE:
            c = table(cos_ptr, stride_cb, stride_cs, sample, token, live, pair, PAIRS)
            w = table(sin_ptr, stride_sb, stride_ss, sample, token, live, pair, PAIRS)
        else:
            axis_row = axis_ptr + spec_row * PAIRS
            c, w = position_angles(
                pos_ptr, stride_pa, stride_pb, stride_ps, axes, axis_row, freq_ptr, sample, token, live, pair, PAIRS
            )
        c, w = c * scale, w * sign
        c1, w1 = c, w
        if APART:
            c1 = table(cos_ptr + stride_cm, stride_cb, stride_cs, sample, token, live, pair, PAIRS) * scale
            w1 = table(sin_ptr + stride_sm, stride_sb, stride_ss, sample, token, live, pair, PAIRS) * sign
        _turn_heads(
            q_ptr, q_out_ptr, stride_qb, stride_qs, stride_qn, stride_qob, stride_qos, stride_qon,
            sample, token, live, spec_row * (n // ROWS), n // ROWS, c, w, c1, w1, pair, rest,
            OFFSET, PAIRS, HELD, R, BLOCKS, HAS_REST, ALIGN, BLOCK_H,
        )  # fmt: skip
        if HAS_K:
            _turn_heads(
                k_ptr, k_out_ptr, stride_kb, stride_ks, stride_kn, stride_kob, stride_kos, stride_kon,
                sample, token, live, spec_row * (m // ROWS), m // ROWS, c, w, c1, w1, pair, rest,
                OFFSET, PAIRS, HELD, R, BLOCKS, HAS_REST, ALIGN, BLOCK_H,
            )  # fmt: skip


def _check(q: Tensor, k: Tensor | None, pos, axis, freq, cos, sin, layout: list[int]) -> None:
    """What keeps the kernel inside its tensors, for callers who come past the public function."""
    tables: tuple[tuple[str, Tensor | None, str], ...]
    if cos is None:
        tables = (("axis", axis, "h r"), ("freq", freq, "r"), ("pos", pos, "a x p"))
    else:
        row = "p r" if cos.dim() == 3 else "p e r"
        tables = (("cos", cos, "x " + row), ("sin", sin, "y " + row))
    axes = bind("apply_rope", ("q", q, "b s n d"), ("k", k, "b s m d"), *tables)
    if q.dtype not in FLOATS or (k is not None and k.dtype != q.dtype):
        same_dtype("apply_rope", ("q", q), ("k", k))
    b, s, d, pairs = axes["b"], axes["s"], axes["d"], axes["r"]
    for name, samples in (("pos" if cos is None else "cos", axes["x"]), ("sin", axes.get("y", 1))):
        if axes["p"] != s or samples not in (1, b):
            require(False, "apply_rope", name, f"speak of 1 or {b} samples of {s} tokens", (samples, axes["p"]))
    blocks, offset = layout
    if "e" in axes and (axes["e"] != 2 or blocks):
        require(False, "apply_rope", "cos", "have an angle for each of two neighbours", tuple(cos.shape))
    if offset < 0 or blocks < 0 or offset + 2 * pairs > d or pairs % max(blocks, 1):
        require(False, "apply_rope", "layout", f"rotate {2 * pairs} of d={d} elements", layout)


def _table_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of samples, tokens and members of a pair."""
    b, s, *rest = _by_sample(x, 0)
    return b, s, rest[0] if x is not None and x.dim() == 4 else 0


def _by_sample(x: Tensor | None, axis: int) -> tuple[int, ...]:
    """The strides of a table that all samples share, or each has its own of, along `axis`."""
    if x is None:
        return 0, 0, 0
    strides = x.stride()
    return strides if x.shape[axis] > 1 else (*strides[:axis], 0, *strides[axis + 1 :])


def _plan(q, k, pos, axis, freq, cos, sin, layout: list[int], in_place: bool) -> Callable[..., None]:
    """What rotates tensors that look like these, given also where to and by how much."""
    _check(q, k, pos, axis, freq, cos, sin, layout)
    b, s, n, d = q.shape
    m = 0 if k is None else k.shape[2]
    blocks, offset = layout
    pairs = freq.shape[0] if cos is None else cos.shape[-1]
    here = tiles("apply_rope", "_apply_rope_kernel", arch(q.device), d=d)
    both = (q, q if k is None else k)
    written = both if in_place else map(blueprint, both)
    strides = [stride for x in (*both, *written) for stride in x.stride()[:3]]
    align = alignment(strides)
    grid = (cdiv(b * s, here["BLOCK_S"]),)
    numbers = (
        *[stride // align for stride in strides],
        *_by_sample(pos, 1), 0 if pos is None else pos.shape[0], *_table_strides(cos), *_table_strides(sin),
        b * s, s, n, m,
    )  # fmt: skip
    # Neighbours that begin with the head: what follows them is held like pairs, in the same whole vectors.
    whole = blocks == 0 and offset == 0 and d % 2 == 0 and d <= 2 * power_of_2(pairs)
    meta = {
        "ROWS": 1 if axis is None else axis.shape[0], "D": d, "OFFSET": offset, "PAIRS": pairs,
        "HELD": d // 2 if whole else pairs, "BLOCKS": blocks,
        "TABLE": cos is not None, "APART": cos is not None and cos.dim() == 4, "HAS_K": k is not None,
        "HAS_REST": d > 2 * pairs and not in_place and not whole,
        "R": power_of_2(pairs), "BLOCK_D": power_of_2(d), "ALIGN": align, **here,
    }  # fmt: skip

    def run(q, k, q_out, k_out, pos, axis, freq, cos, sin, scale, inverse) -> None:
        k_in, k_to = (q, q_out) if k is None else (k, k_out)
        launch(
            _apply_rope_kernel, grid, q, k_in, q_out, k_to, pos, axis, freq, cos, sin, *numbers,
            scale, -scale if inverse else scale, **meta,
        )  # fmt: skip

    return run


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else unit_stride(x)


@planned
def out_of_place(q: Tensor, k: Tensor | None, pos, axis, freq, cos, sin, scale, inverse, layout) -> Callable[..., Any]:
    turn_into = _plan(_rows(q), _rows(k), pos, axis, freq, _rows(cos), _rows(sin), layout, in_place=False)

    def run(q, k, pos, axis, freq, cos, sin, scale, inverse, layout) -> tuple[Tensor, Tensor]:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
        k_out = q.new_empty(0) if k is None else torch.empty_like(k, memory_format=torch.contiguous_format)
        q, k, cos, sin = _rows(q), _rows(k), _rows(cos), _rows(sin)
        turn_into(q, k, q_out, k_out, pos, axis, freq, cos, sin, scale, inverse)
        return q_out, k_out

    return run


@planned
def in_place(q: Tensor, k: Tensor | None, pos, axis, freq, cos, sin, scale, inverse, layout) -> Callable[..., Any]:
    turn_into = _plan(q, k, pos, axis, freq, cos, sin, layout, in_place=True)

    def run(q, k, pos, axis, freq, cos, sin, scale, inverse, layout) -> None:
        turn_into(q, k, q, k, pos, axis, freq, cos, sin, scale, inverse)

    return run
