"""rearrange on Triton, affine: a move by strides, every side read and written in whole lines.

Neighbouring factors that run on are merged. What is contiguous on both sides is copied in runs, in the order of the
output. Where the channels move, a tile of (the output's fastest factor) x (the input's fastest factor) is read along
the one, turned in shared memory and written along the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vkernels.check import require
from vkernels.ops.rearrange.triton import BITS
from vkernels.ops.rearrange.triton_gather import OP
from vkernels.remember import planned
from vkernels.triton.launch import arch, cdiv, launch, power_of_2
from vkernels.triton.tiles import tiles

OUTER = 7  # factors beside the run; with two of them in the tile, 5 remain
SHORT = 8  # a factor no longer than this is the narrow side of a tile
Factor = tuple[int, int, int]  # size, stride in x, stride in y
Move = tuple[Any, tuple[int, ...], tuple[int | None, ...], dict[str, Any]]  # kernel, grid, numbers, meta


@triton.jit
def _split(at, index, size, step, ALIGN: tl.constexpr):
    """One factor, innermost first: its part of `index` moved into the offset `at`."""
    if size is None:
        return at, index
    else:
        return at + index % size * (step * ALIGN), index // size


@triton.jit
def _offset(index, n0, n1, n2, n3, n4, n5, n6, s0, s1, s2, s3, s4, s5, s6, ALIGN: tl.constexpr):
    """Where the outer factors of `index` begin: sizes n, steps s in units of ALIGN elements; None is no factor."""
    at, left = _split(index * 0, index, n0, s0, ALIGN)
    at, left = _split(at, left, n1, s1, ALIGN)
    at, left = _split(at, left, n2, s2, ALIGN)
    at, left = _split(at, left, n3, s3, ALIGN)
    at, left = _split(at, left, n4, s4, ALIGN)
    at, left = _split(at, left, n5, s5, ALIGN)
    at, left = _split(at, left, n6, s6, ALIGN)
    return at


_RUN_SIZES = ["n0", "n1", "n2", "n3", "n4", "n5", "n6", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "rows", "run"]


@triton.jit(do_not_specialize=_RUN_SIZES)
def _copy_runs_kernel(
    x_ptr, y_ptr, n0, n1, n2, n3, n4, n5, n6, s0, s1, s2, s3, s4, s5, s6, rows, run,
    ALIGN: tl.constexpr, RUN_ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    run = run * RUN_ALIGN
    parts = (run + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0).to(tl.int64)
    row = block // parts * BLOCK_R + tl.arange(0, BLOCK_R)
    column = block % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    at = _offset(row, n0, n1, n2, n3, n4, n5, n6, s0, s1, s2, s3, s4, s5, s6, ALIGN)
    inside = (row < rows)[:, None] & (column < run)[None, :]
    x = tl.load(x_ptr + at[:, None] + column[None, :], mask=inside, other=0)
    tl.store(y_ptr + (row * run)[:, None] + column[None, :], x, mask=inside)


_TURN_SIZES = [f"{field}{i}" for field in "nst" for i in range(6)]
_TURN_SIZES += ["size_i", "size_j", "stride_xi", "stride_xj", "stride_yi", "wide_x", "wide_y"]


@triton.jit
def _tile(base, i, j, size_i, size_j, stride_i, stride_j, UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a tile [j, i], and which lie inside. What WIDTH divides is written so that the compiler sees it."""
    inside = (j < size_j)[:, None] & (i < size_i // WIDTH * WIDTH)[None, :]
    along = i if UNIT else i * stride_i
    return base // WIDTH * WIDTH + (j * (stride_j // WIDTH * WIDTH))[:, None] + along[None, :], inside


@triton.jit
def _load_tile(ptr, base, i, j, size_i, size_j, stride_i, stride_j, UNIT: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = _tile(base, i, j, size_i, size_j, stride_i, stride_j, UNIT, WIDTH)
    return tl.load(ptr + at, mask=inside, other=0)


@triton.jit
def _store_tile(ptr, base, value, i, j, size_i, size_j, stride_j, WIDTH: tl.constexpr):
    at, inside = _tile(base, i, j, size_i, size_j, 1, stride_j, True, WIDTH)
    tl.store(ptr + at, value, mask=inside)


@triton.jit(do_not_specialize=_TURN_SIZES)
def _turn_kernel(
    x_ptr, y_ptr, n0, n1, n2, n3, n4, n5, s0, s1, s2, s3, s4, s5, t0, t1, t2, t3, t4, t5,
    size_i, size_j, stride_xi, stride_xj, stride_yi, wide_x, wide_y,
    X_UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """i is the factor along which x is contiguous, j the one along which y is. Either side moves WIDTH elements at a
    time where that divides its sizes and strides: a branch, as two kernels would compile anew for another length."""
    block = tl.program_id(0).to(tl.int64)
    parts_i, parts_j = (size_i + BLOCK_I - 1) // BLOCK_I, (size_j + BLOCK_J - 1) // BLOCK_J
    i = block % parts_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = block // parts_i % parts_j * BLOCK_J + tl.arange(0, BLOCK_J)
    index = block // parts_i // parts_j
    from_x = _offset(index, n0, n1, n2, n3, n4, n5, None, s0, s1, s2, s3, s4, s5, None, 1)
    to_y = _offset(index, n0, n1, n2, n3, n4, n5, None, t0, t1, t2, t3, t4, t5, None, 1)
    if wide_x != 0:
        x = _load_tile(x_ptr, from_x, i, j, size_i, size_j, stride_xi, stride_xj, X_UNIT, WIDTH)
    else:
        x = _load_tile(x_ptr, from_x, i, j, size_i, size_j, stride_xi, stride_xj, X_UNIT, 1)
    y = tl.trans(x)
    if wide_y != 0:
        _store_tile(y_ptr, to_y, y, j, i, size_j, size_i, stride_yi, WIDTH)
    else:
        _store_tile(y_ptr, to_y, y, j, i, size_j, size_i, stride_yi, 1)


def _factors(x: Tensor, axes: list[int], sizes: list[int], steps: list[int], shape: list[int]) -> list[Factor]:
    """Factors in output order, checked, those that run on merged, those of one element left out."""
    same = len(axes) == len(sizes) == len(steps)
    require(same, OP, "axes", "have a size and a step for every factor", (len(axes), len(sizes), len(steps)))
    good = all(n >= 0 and s >= 0 and -1 <= a < x.dim() for a, n, s in zip(axes, sizes, steps, strict=True))
    require(good, OP, "axes", "name axes of x with sizes and steps that are not negative", axes)
    require(math.prod(sizes) == math.prod(shape), OP, "sizes", f"multiply to the size of {shape}", sizes)
    factors: list[Factor] = []
    if 0 in sizes:
        return factors
    reach = [0] * x.dim()
    stride_y = math.prod(sizes)
    for axis, size, step in zip(axes, sizes, steps, strict=True):
        stride_y //= size
        stride_x = 0 if axis < 0 else step * x.stride(axis)
        if axis >= 0:
            reach[axis] += (size - 1) * step
        if size == 1:
            continue
        if factors and factors[-1][1:] == (stride_x * size, stride_y * size):
            factors[-1] = (factors[-1][0] * size, stride_x, stride_y)
        else:
            factors.append((size, stride_x, stride_y))
    require(all(r < n for r, n in zip(reach, x.shape, strict=True)), OP, "steps", "stay inside x", reach)
    return factors


@planned
def affine(x: Tensor, axes: list[int], sizes: list[int], steps: list[int], shape: list[int]) -> Callable[..., Tensor]:
    factors, made = _factors(x, axes, sizes, steps, shape), tuple(shape)
    if math.prod(made) == 0:
        return lambda x, *_: x.new_empty(made)
    require(len(factors) <= OUTER + 1, OP, "axes", f"have at most {OUTER + 1} factors that do not run on", len(factors))
    bits = BITS[x.element_size()]
    if not factors or factors[-1][1] == 1:
        return _copying(x, made, factors or [(1, 1, 1)])
    kernel, grid, numbers, meta = _turn(x, factors)

    def run(x: Tensor, *_: Any) -> Tensor:
        y = x.new_empty(made)
        launch(kernel, grid, x.view(bits), y.view(bits), *numbers, **meta)
        return y

    return run


def _copying(x: Tensor, made: tuple[int, ...], factors: list[Factor]) -> Callable[..., Tensor]:
    """Runs in elements, or, where they are no multiple of 16 bytes, in the largest units of up to 8 bytes that divide
    runs and steps: 14 x 3 bfloat16 of a patch are 21 times 4 bytes. Where x begins is not known before the call."""
    size, unit = x.element_size(), 1
    apart = [factors[-1][0], *(stride for _, stride, _ in factors[:-1])]
    if _wide(size, apart[:1]) == 1:
        while 2 * unit * size <= 8 and all(n % (2 * unit) == 0 for n in apart):
            unit *= 2
    plans = {n: _copy_runs(x, n, math.prod(made), factors) for n in {1, unit}}

    def run(x: Tensor, *_: Any) -> Tensor:
        y = x.new_empty(made)
        units = unit if x.data_ptr() % (unit * size) == 0 else 1
        kernel, grid, numbers, meta = plans[units]
        bits = BITS[units * size]
        from_x = x if units == 1 else x.as_strided((units,), (1,))  # kernels take an address
        launch(kernel, grid, from_x.view(bits), y.view(-1).view(bits), *numbers, **meta)
        return y

    return run


def _padded(values: list[int], n: int) -> list[int | None]:
    return [*values, *[None] * (n - len(values))]


def _copy_runs(x: Tensor, unit: int, elements: int, factors: list[Factor]) -> Move:
    size = unit * x.element_size()
    outer = [(n, stride // unit, 0) for n, stride, _ in reversed(factors[:-1])]
    run, elements = factors[-1][0] // unit, elements // unit
    here = dict(tiles(OP, "_copy_runs_kernel", arch(x.device), bytes=size))
    align, run_align = _wide(size, [stride for _, stride, _ in outer]), _wide(size, [run])
    columns, block = min(power_of_2(run), here.pop("BLOCK_C")), here.pop("BLOCK")
    # An element that is loaded alone has an address of its own, and so many do not fit into registers.
    block_r = max(1, (block if align * run_align > 1 else block // 4) // columns)
    rows = elements // run
    numbers = (
        *_padded([size for size, _, _ in outer], OUTER), *_padded([stride // align for _, stride, _ in outer], OUTER),
        rows, run // run_align,
    )  # fmt: skip
    meta = {"ALIGN": align, "RUN_ALIGN": run_align, "BLOCK_R": block_r, "BLOCK_C": columns, **here}
    return _copy_runs_kernel, (cdiv(rows, block_r) * cdiv(run, columns),), numbers, meta


def _sides(size_i: int, size_j: int, block: int, side: int) -> tuple[int, int]:
    """A square tile, or where a factor is short one that is long along the other. Three shapes, so that a length does
    not compile anew."""
    if size_j <= SHORT < size_i:
        return block // SHORT, SHORT
    return (SHORT, block // SHORT) if size_i <= SHORT < size_j else (block // side, side)


def _wide(size: int, numbers: list[int]) -> int:
    """The elements of a 16-byte access where it divides every number, else 1: two variants, not one per divisor."""
    elements = min(8, 16 // size)
    return elements if all(number % elements == 0 for number in numbers) else 1


def _turn(x: Tensor, factors: list[Factor]) -> Move:
    """Tiles of the factor x is fastest along and the one y is fastest along, which is the last."""
    j = factors[-1]
    rest = factors[:-1] or [(1, 0, 1)]
    i = min((f for f in rest if f[1] > 0), key=lambda f: f[1], default=rest[-1])
    rest.remove(i)
    rest.reverse()
    here = dict(tiles(OP, "_turn_kernel", arch(x.device), bytes=x.element_size()))
    block_i, block_j = _sides(i[0], j[0], here.pop("BLOCK"), here.pop("SIDE"))
    size = x.element_size()
    wide_x = i[1] == 1 and _wide(size, [i[0], *(f[1] for f in (*rest, j))]) > 1
    wide_y = _wide(size, [j[0], *(f[2] for f in (*rest, i))]) > 1
    numbers = (
        *_padded([f[0] for f in rest], OUTER - 1), *_padded([f[1] for f in rest], OUTER - 1),
        *_padded([f[2] for f in rest], OUTER - 1), i[0], j[0], i[1], j[1], i[2], int(wide_x), int(wide_y),
    )  # fmt: skip
    meta = {"X_UNIT": i[1] == 1, "WIDTH": _wide(size, []), "BLOCK_I": block_i, "BLOCK_J": block_j, **here}
    count = cdiv(i[0], block_i) * cdiv(j[0], block_j) * math.prod(f[0] for f in rest)
    return _turn_kernel, (count,), numbers, meta
