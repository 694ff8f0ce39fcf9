"""The CUDA kernels of apply_rope, emulated: every path, borders of blocks and warps, hostile values in direct calls.

Planted one at a time in csrc/apply_rope/apply_rope_cuda.cu and csrc/include/vkernels/device/rope.h, each seen red
here or, where the spec's heads follow different axes, in the derived tests. Barriers: after the table, before the
table is filled again, before a stage is filled again, after a copy. Copies: not waited for, not committed, two slots
sharing a stage. Borders: the last head of a group, one head too many, the last column, one token too many, the
element where turning begins. Pairs: neighbours taken one apart, their angles taken twice, both halves looked for
above, a sine not negated. Alignment: rows of odd length, odd strides, halves or an offset that are not whole vectors,
taken for whole vectors. Values: the first heads' angles for all, an axis that is not there followed, a table's stride
taken from the other one.
"""

from __future__ import annotations

import pytest
import torch

from vkernels import RopeSpec, apply_rope, library
from vkernels.testing import strided

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

ROPE = torch.ops.vkernels.apply_rope.cuda


def close_to_reference(q, k, spec, pos, **how):
    want = apply_rope(q, k, spec, pos, backend="reference", **how)
    got = apply_rope(q, k, spec, pos, backend="cuda", **how)
    for g, w in zip((got, want) if k is None else got, (want,) if k is None else want, strict=False):
        assert g.dtype == w.dtype
        ulp = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[q.dtype]
        torch.testing.assert_close(g, w, rtol=ulp, atol=4e-6)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ["half", "pair", "axial"])
@pytest.mark.parametrize(
    ("d", "rotary", "offset"),
    [
        (64, 64, 0),  # whole vectors in every layout
        (72, 72, 0),  # halves four and a half 16-bit vectors apart: through shared memory
        (88, 72, 8),
        (128, 48, 16),  # vectors that turn beside vectors that do not
        (40, 24, 5),  # pairs across vectors
        (20, 12, 2),  # rows that are not whole vectors: by elements
        (2, 2, 0),
    ],
)
def test_every_path(dtype, layout, d, rotary, offset):
    if layout == "axial" and rotary % 4:
        pytest.skip("axial needs two equal halves")
    torch.manual_seed(d)
    spec = RopeSpec.build(rotary, 1e4, layout=layout, offset=offset)
    q, k = torch.randn(2, 3, 5, d).to(dtype), torch.randn(2, 3, 2, d).to(dtype)
    pos = torch.randint(0, 5000, (1, 2, 3))
    out = close_to_reference(q, k, spec, pos)
    want = [x.clone() for x in out]
    apply_rope(q, k, spec, pos, inplace=True, backend="cuda")
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])


@pytest.mark.parametrize(("s", "heads"), [(1, 1), (31, 1), (33, 1), (257, 1), (3, 33), (2, 65), (1, 300)])
@pytest.mark.parametrize("d", [8, 72])
def test_borders_of_blocks(s, heads, d):
    """Tokens and heads that do not fill the lanes a block has for them."""
    q, k = torch.randn(1, s, heads, d).bfloat16(), torch.randn(1, s, 1, d).bfloat16()
    close_to_reference(q, k, RopeSpec.build(d), torch.arange(s))


def test_one_row_that_is_not_whole_vectors():
    """No stride gives it away: the last four elements are no vector of their own."""
    close_to_reference(torch.randn(1, 1, 1, 20).bfloat16(), None, RopeSpec.build(16), torch.ones(1))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_that_leave_16_byte_addresses(dim):
    """The first row starts at one, the next ones do not."""
    shape = [2, 2, 2, 64]
    strides = [256, 128, 64, 1]
    strides[dim] += 4
    if dim == 2:
        strides[:2] = [512, 256]
    elif dim == 1:
        strides[0] = 512
    memory = torch.randn(1024).bfloat16()
    close_to_reference(memory.as_strided(shape, strides), None, RopeSpec.build(64), torch.arange(2))


def test_more_pairs_than_threads():
    q = torch.randn(1, 2, 1, 2050)
    close_to_reference(q, None, RopeSpec.build(2048), torch.arange(2))
    close_to_reference(q[..., :2049], None, RopeSpec.build(2048, layout="pair", offset=1), torch.arange(2))
    close_to_reference(torch.randn(1, 2, 1, 2048), None, RopeSpec.build(2040), torch.arange(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_alignment_and_bits(dtype):
    """However the tensors lie, whichever kernel runs: the same bits."""
    spec = RopeSpec.build(64)
    q, k, pos = torch.randn(2, 5, 4, 64).to(dtype), torch.randn(2, 5, 2, 64).to(dtype), torch.arange(5)
    want = apply_rope(q, k, spec, pos, backend="cuda")
    packed = torch.cat([q, k], 2)
    q_odd, k_odd = strided(q), packed[:, :, 4:]
    got = apply_rope(q_odd, k_odd, spec, pos, backend="cuda")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    apply_rope(packed[:, :, :4], packed[:, :, 4:], spec, pos, inplace=True, backend="cuda")
    assert torch.equal(packed, torch.cat(want, 2))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("d", [64, 72])
def test_the_order_of_threads_does_not_matter(order, d):
    q, spec, pos = torch.randn(1, 9, 7, d).bfloat16(), RopeSpec.build(d), torch.arange(9)
    want = apply_rope(q, None, spec, pos, backend="cuda")
    library.emulator.module.set_order(order)
    try:
        got = apply_rope(q, None, spec, pos, backend="cuda")
    finally:
        library.emulator.module.set_order(3)
    assert torch.equal(got, want)


def test_tables_of_one_sample_serve_all():
    q, spec = torch.randn(3, 4, 2, 32), RopeSpec.build(32)
    shared, each = torch.randn(1, 4, 16), torch.randn(3, 4, 16)
    close_to_reference(q, None, spec, None, angle=(shared, each))
    close_to_reference(q, None, spec, None, angle=(each, shared))


def rope_arguments(q, spec, pos):
    axis, freq = spec.tables(q.device)
    return [q, None, pos, axis, freq, None, None, 1.0, False, [spec.blocks, spec.offset]]


def test_what_cannot_be_turned_is_copied_bit_for_bit():
    q = torch.randn(1, 3, 2, 32)
    q[0, 0, 0, 20:24] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-45])
    for offset in (0, 2):
        spec = RopeSpec.build(16, offset=offset)
        y = apply_rope(q, None, spec, torch.arange(3), backend="cuda")
        assert torch.equal(y[..., offset + 16 :].view(torch.int32), q[..., offset + 16 :].view(torch.int32))
        assert torch.equal(y[..., :offset], q[..., :offset])


def test_values_nobody_can_look_at_before_the_launch():
    """On a GPU an axis that is not there is not refused: its pairs do not turn, and nothing is read outside."""
    q, spec, pos = torch.randn(1, 4, 2, 8), RopeSpec.build(8), torch.ones(1, 1, 4)
    arguments = rope_arguments(q, spec, pos)
    for axis in (-1, 1, 9, 2**31 - 1, -(2**31)):
        arguments[3] = torch.full((1, 4), axis, dtype=torch.int32)
        assert torch.equal(ROPE(*arguments)[0], q)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({2: torch.zeros(1, 1, 3)}, "pos must have size 4 in dimension 2"),
        ({2: torch.zeros(1, 2, 4)}, "pos must have b or 1 rows"),
        ({2: torch.zeros(1, 1, 4, dtype=torch.float16)}, "pos must be int32, int64, float32 or float64"),
        ({3: torch.zeros(1, 3, dtype=torch.int32)}, "axis must have size 4 in dimension 1"),
        ({4: torch.zeros(4, dtype=torch.int32)}, "freq must have dtype code 4"),
        ({9: [1, 2]}, "offset must leave the rotary part inside the head"),
        ({9: [3, 0]}, "layout must divide the pairs into equal blocks"),
        ({1: torch.zeros(1, 4, 1, 16)}, "k must have size 8 in dimension 3"),
        ({3: torch.zeros(3, 4, dtype=torch.int32)}, "q must have a multiple of the heads of axis"),
    ],
)
def test_a_direct_call_is_refused_before_it_could_read_outside(change, match):
    arguments = rope_arguments(torch.randn(1, 4, 2, 8), RopeSpec.build(8), torch.zeros(1, 1, 4))
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=f"apply_rope: {match}"):
        ROPE(*arguments)


def test_without_the_emulator_the_cpu_is_refused(monkeypatch):
    arguments = rope_arguments(torch.randn(1, 4, 2, 8), RopeSpec.build(8), torch.zeros(1, 1, 4))
    monkeypatch.setattr(library, "emulator", None)
    with pytest.raises(library.NoBackend, match="apply_rope: tensors must be on an NVIDIA GPU, got cpu"):
        ROPE(*arguments)


def test_tensors_of_two_devices_are_refused():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(TypeError, match=r"apply_rope: tensors must be on one device \(cpu\), got meta"):
        library.run_cuda("apply_rope_cuda", (q, q.to("meta")))


def test_gradients_turn_back():
    spec, pos = RopeSpec.build(72), torch.arange(6)
    q = torch.randn(1, 6, 3, 72, requires_grad=True)
    grad = torch.randn(1, 6, 3, 72)
    apply_rope(q, None, spec, pos, backend="cuda").backward(grad)
    torch.testing.assert_close(apply_rope(q.grad, None, spec, pos, backend="reference"), grad, rtol=0, atol=2e-6)
