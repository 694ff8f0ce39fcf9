"""Tiles of rows in shared memory and softmax over fragments (device/tile.h, device/softmax.h), emulated."""

from __future__ import annotations

import math

import pytest
import torch

from vkernels import library
from vkernels.library import ref

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

E = library.emulator.module


@pytest.mark.parametrize("columns", [16, 32, 64, 72, 80, 88, 96, 128])
def test_eight_rows_lie_in_eight_groups_of_banks(columns):
    """A multiprocessor serves eight vectors at a time where they differ in their place modulo 128 bytes."""
    vectors = columns // 8
    places = [[E.vector_place(columns, row, vector) for vector in range(vectors)] for row in range(32)]
    assert sorted(place for row in places for place in row) == list(range(32 * vectors))
    for first in range(0, 32, 8):
        for vector in range(vectors):
            assert len({places[row][vector] % 8 for row in range(first, first + 8)}) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("columns", "used"), [(16, 16), (64, 64), (80, 72), (96, 88), (128, 128), (64, 8)])
def test_products_of_tiles(dtype, columns, used):
    """Small integers, so every product is exact; rows from anywhere, some from nowhere, some columns empty."""
    memory = torch.full((40, columns + 8), math.nan, dtype=dtype)
    x = memory[:, :used]
    x.copy_(torch.randint(-3, 4, (40, used)))
    rows = torch.randperm(40)[:32].int()
    rows[[0, 7, 31]] = -1
    w = torch.randint(-3, 4, (32, 32)).to(dtype)
    gram, mixed, back = torch.full((32, 32), math.nan), torch.full((32, columns), math.nan), torch.zeros_like(memory)
    tensors = [ref(t) for t in (x, rows, w, gram, mixed, back[:, :used])]
    E.allow(tensors)
    try:
        E.products(*tensors, used)
    finally:
        E.allow([])
    tile = torch.zeros(32, columns)
    tile[rows >= 0, :used] = x[rows[rows >= 0].long()].float()
    assert torch.equal(gram, tile @ tile.T)
    assert torch.equal(mixed, w.float() @ tile)
    want = torch.zeros_like(memory)
    want[rows[rows >= 0].long(), :used] = mixed[rows >= 0, :used].to(dtype)
    assert torch.equal(back, want)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_softmax_while_scores_pass_by(scale):
    scores = torch.randn(16, 48) * 4
    scores[2] = -math.inf  # sees nothing
    scores[5, :32] = -math.inf  # sees something late
    scores[9, 1:] = -math.inf
    scores[:, 20] = -math.inf
    weights, lse, inverse = scores.clone(), torch.full((16,), math.nan), torch.full((16,), math.nan)
    E.soften(ref(weights), ref(lse), ref(inverse), scale)
    natural = scores.double() * scale * math.log(2)
    want = torch.softmax(natural, 1).nan_to_num(0.0)
    torch.testing.assert_close(weights.double() * inverse.double()[:, None], want, rtol=5e-6, atol=0)
    torch.testing.assert_close(lse.double(), torch.logsumexp(natural, 1), rtol=1e-6, atol=1e-6)
    assert inverse[2] == 1


def test_what_a_row_that_saw_nothing_subtracts():
    assert E.lse_to_subtract(-math.inf) == math.inf
    assert E.lse_to_subtract(math.log(2)) == pytest.approx(1.0)
