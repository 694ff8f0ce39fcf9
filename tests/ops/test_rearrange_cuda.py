"""rearrange in CUDA C++, emulated: the CPU kernels are the witness, at borders of lanes, tiles and chunks, however
tensors lie, whatever the plan holds.

Planted one at a time in csrc/rearrange/{move.h,gather.h,rearrange_cuda.cu}, each seen red here: the barrier between
filling a tile and reading it, an element of a vector taken for the first, row numbers and tap ranges believed, the
barrier before the sums of other warps are read, the first row's sums for every row of a block. Blind to the barrier
after those sums: the emulator's warps meet at the next shuffle first.
"""

from __future__ import annotations

import pytest
import torch

from vkernels import library, rearrange
from vkernels import rearrangement as plans
from vkernels.ops.rearrange import torch_op

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

ROWS = torch.ops.vkernels.rearrange_rows.cuda
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def close_to_cpu(x, plan, gradients=True, **how):
    """Forward and every gradient, as the CPU kernel has them."""
    results = []
    for backend in ("cuda", "cpu"):
        leaves = {name: v for name, v in how.items() if isinstance(v, torch.Tensor)}
        sources = [x] if isinstance(x, torch.Tensor) else x
        if gradients:
            leaves = {name: v.detach().clone().requires_grad_() for name, v in leaves.items()}
            sources = [t.detach().requires_grad_() for t in sources]
        out = rearrange(
            sources[0] if isinstance(x, torch.Tensor) else sources, plan, **{**how, **leaves}, backend=backend
        )
        out = list(out) if isinstance(out, tuple) else [out]
        torch.manual_seed(3)
        grads = [torch.randn_like(y) for y in out]
        back = torch.autograd.grad(out, [*sources, *leaves.values()], grads) if gradients else ()
        results.append([*out, *back])
    tolerance = TOLERANCE[sources[0].dtype]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))
    return results[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        ("b s c -> b c s", (2, 130, 72)),  # a tile and a bit along both sides
        ("b s c -> b c s", (1, 8, 256)),
        ("b s c -> b c s", (2, 33, 65)),  # sides that are not whole vectors
        ("b s c -> b c s", (1, 3, 300)),
        ("b t l c -> b l t c", (2, 3, 5, 48)),
        ("b t l c -> b l t c", (1, 3, 5, 7)),
        ("b t l c -> b l t c", (1, 3, 5, 42)),  # runs of 21 units of twice an element
        ("b t l c -> c t b l", (2, 16, 3, 16)),
        ("b s c -> b r s c", (2, 3, 16)),
    ],
)
def test_moves_by_strides(pattern, shape, dtype):
    plan = plans.from_einops(pattern, r=3) if " r " in pattern else plans.from_einops(pattern)
    x = torch.randint(0, 100, shape).to(dtype)
    want = rearrange(x, plan, backend="reference")
    assert torch.equal(rearrange(x, plan, backend="cuda"), want)
    odd = torch.cat([x[..., :1], x], -1)[..., 1:]  # rows that leave 16-byte addresses
    assert torch.equal(rearrange(odd, plan, backend="cuda"), want)
    apart = torch.stack([x, x], -1)[..., 0]  # elements two apart
    assert torch.equal(rearrange(apart, plan, backend="cuda"), want)


def test_a_nan_keeps_its_payload():
    x = torch.tensor([0x7FC1, 0xFFFF, 0x7F81, 0x8000] * 4, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = rearrange(x.view(1, 2, 8), plans.keep(indices=torch.tensor([1, 0]), n=2), backend="cuda")
    assert torch.equal(y.view(torch.int16), x.view(torch.int16).view(1, 2, 8).flip(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("c", [1, 24, 2100])
def test_rows_moved_bit_for_bit(dtype, c):
    plan = plans.keep(indices=torch.tensor([[4, 1, 1, 0, 3], [2, 2, 0, 4, 1]]), n=5)
    x = torch.randint(0, 2, (2, 5, c)).to(dtype)
    assert torch.equal(rearrange(x, plan, backend="cuda"), rearrange(x, plan, backend="reference"))


# One lane, part of a warp, a whole one, warps side by side, one row a block; rows that are not whole vectors.
WIDTHS = [8, 40, 72, 512, 528, 1040, 33]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("c", WIDTHS)
def test_epilogue_and_its_gradients(c, norm, dtype):
    torch.manual_seed(c)
    x = torch.randn(2, 9, c).to(dtype)
    weights = {} if norm is None else {"norm_weight": torch.randn(c).to(dtype), "norm_bias": torch.randn(c)}
    plan = plans.keep(indices=torch.tensor([[8, 1, 1, 4, 0], [2, 3, 5, 7, 8]]), n=9)
    close_to_cpu(
        x, plan, bias=torch.randn(c), gate=torch.randn(c), scale=0.5, residual=torch.randn(2, 5, c).to(dtype),
        norm=norm, return_sum=True, **weights,
    )  # fmt: skip


def test_a_norm_alone_and_few_of_its_gradients():
    x, plan = torch.randn(1, 40, 64), plans.keep(indices=torch.arange(0, 40, 2), n=40)
    close_to_cpu(x, plan, norm="layer", norm_weight=torch.randn(64))
    close_to_cpu(x, plan, norm="rms", norm_bias=torch.randn(64), dtype=torch.float32)
    close_to_cpu(x, plan, norm="layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [24, 33, 2056])
def test_taps_of_several_sources(c, dtype):
    video = plans.pool(2, 3, 5, mode="bilinear").compose(plans.newline(2, 2, 3))
    plan = plans.assemble([("text", 3), ("video", 16), ("text", 2)], video=video)
    x = [torch.randn(1, 5, c).to(dtype), torch.randn(1, 30, c).to(dtype)]
    close_to_cpu(x, plan, fill=torch.randn(1, c).to(dtype))
    pooled = plans.pool(1, 4, 6, mode="mean", stride=2)
    close_to_cpu(torch.randn(2, 24, c).to(dtype), pooled, norm="rms", norm_weight=torch.randn(c))


def test_sources_whose_rows_lie_on_several_axes():
    x = torch.randn(2, 6, 5, 4, 24)[:, ::2, 1:4, ::3]
    plan = plans.keep(indices=torch.tensor([17, 0, 5, 11, 3]), n=18)
    close_to_cpu(x, plan, gradients=False, norm="layer")
    shared = torch.randn(1, 18, 24).expand(3, -1, -1)
    close_to_cpu(shared, plan, gradients=False, scale=2.0)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_into_rows_of_a_tensor_that_exists(dtype, accumulate):
    plan = plans.keep(indices=torch.tensor([3, 1, 0]), n=4)
    x, rows = torch.randn(2, 4, 24), torch.tensor([[5, -1, 0], [2, 3, 4]])
    found = []
    for backend in ("cuda", "cpu"):
        out = torch.full((2, 6, 48), 7.0, dtype=dtype)[..., 8:32]
        rearrange(x, plan, out=out, rows=rows, accumulate=accumulate, scale=1.5, backend=backend)
        found.append(out.clone())
    torch.testing.assert_close(*found, rtol=2.0**-7, atol=1e-6)
    moved = torch.zeros(2, 6, 24)
    rearrange(x, plan, out=moved, rows=rows, backend="cuda")
    assert torch.equal(moved[1, 2:5], x[1, [3, 1, 0]])
    assert not moved[0, 1:5].any()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_threads_does_not_matter(order):
    def results():
        torch.manual_seed(0)
        x, plan = torch.randn(1, 7, 1040), plans.keep(indices=torch.arange(6), n=7)
        made = close_to_cpu(x, plan, norm="layer", norm_weight=torch.randn(1040), gate=torch.randn(1040))
        turned = rearrange(torch.randn(1, 130, 72).half(), plans.from_einops("b s c -> b c s"), backend="cuda")
        return [*made, turned]

    want = results()
    library.emulator.module.set_order(order)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))
    finally:
        library.emulator.module.set_order(3)


def direct(x, ptr, idx, weight=None, **how):
    given = {"bias": None, "gate": None, "residual": None, "norm_weight": None, "norm_bias": None, **how}
    reduce, norm = given.pop("reduce", 0), given.pop("norm", 0)
    y, _ = ROWS(x, ptr, idx, weight, None, None, None, *given.values(), reduce, norm, 1.0, 1e-5, False, x[0].dtype)
    return y


def ints(*values):
    return torch.tensor([values], dtype=torch.int32)


def test_plans_nobody_could_look_at():
    """Row numbers that name no row read as 0, taps outside the plan are not there."""
    x = torch.randn(1, 3, 16)
    low, high = -(2**31), 2**31 - 1
    for hostile in (-1, 3, low, high):
        y = direct([x], None, ints(1, hostile, 2))
        assert torch.equal(y[0], torch.stack([x[0, 1], torch.zeros(16), x[0, 2]]))
        y = direct([x], ints(0, 2, 3), ints(1, hostile, 2))
        assert torch.equal(y[0], x[0, 1:3])
    assert torch.equal(direct([x], ints(low, 2, high), ints(0, 1, 2))[0], torch.stack([x[0, 0] + x[0, 1], x[0, 2]]))
    assert not direct([x], ints(5, low, -3), ints(0, 1, 2)).any()
    out = torch.zeros(1, 2, 16)
    into = torch.ops.vkernels.rearrange_rows_into.cuda
    into(out, [x], None, ints(0, 1, 2), *[None] * 6, ints(high, 1, low), 0, 0, 1.0, 0.0, False)
    assert torch.equal(out[0], torch.stack([torch.zeros(16), x[0, 1]]))


def test_calls_for_other_backends_are_refused_in_sentences():
    with pytest.raises(library.NoBackend, match=r"a maximum is not written in CUDA C\+\+"):
        rearrange(torch.randn(1, 4, 8), plans.pool(1, 2, 2, mode="max"), backend="cuda")
    with pytest.raises(library.NoBackend, match="8200 channels, with a norm, bias or gate it takes at most 8192"):
        rearrange(torch.randn(1, 4, 8200), plans.merge_order(1, 2, 2), norm="rms", backend="cuda")


def test_a_direct_call_is_refused_before_it_could_read_outside():
    x, wide = torch.randn(2, 3, 16), torch.randn(1, 3, 8200)
    for match, call in (
        ("idx must have dtype code 3", lambda: direct([x], None, ints(0).long())),
        ("idx must have 1 or b samples", lambda: direct([x], None, ints(0).expand(3, -1))),
        ("bias must have size 16 in dimension 0", lambda: direct([x], None, ints(0), bias=torch.ones(15))),
        ("residual must have size 1 in dimension 1", lambda: direct([x], None, ints(0), residual=torch.ones(2, 2, 16))),
        ("norm must be 0, 1 or 2", lambda: direct([x], None, ints(0), norm=3)),
        ("reduce must be 0 or 1", lambda: direct([x], None, ints(0), reduce=2)),
        ("x must have size 16 in dimension 2", lambda: direct([x, x[..., :8]], None, ints(0))),
        ("x must have at most 8192 channels under a norm", lambda: direct([wide], None, ints(0), norm=1)),
    ):
        with pytest.raises(ValueError, match=f"rearrange: {match}"):
            call()
    with pytest.raises(ValueError, match="rearrange: steps must stay inside x"):
        torch.ops.vkernels.rearrange_affine.cuda(x, [1], [4], [1], [4])


def test_more_chunks_than_rows_and_rows_than_chunks(monkeypatch):
    for chunks in (1, 3, 40):
        monkeypatch.setattr(torch_op, "chunks", lambda device, chunks=chunks: chunks)
        close_to_cpu(torch.randn(1, 21, 40), plans.keep(indices=torch.arange(21), n=21), norm="rms",
                     norm_weight=torch.randn(40), bias=torch.randn(40))  # fmt: skip
