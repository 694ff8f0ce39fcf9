"""The CUDA kernels of divided_attention, emulated: every path, borders of tiles, warps and blocks, direct calls.

Expected values come from groups taken by hand (test_divided_attention.py) in float64, never from the reference.

Planted one at a time in csrc/divided_attention/ and csrc/include/vkernels/device/row_tile.h, each seen red here.
Packed: sequences of a warp not kept apart, one more than fit, the two rows of a lane exchanged, an operand not
transposed. Barriers and copies: before a stage is read, before it is filled again, copies not waited for, not
committed, one stage where two heads need two. Tiled: keys behind the last seen, the last key of a tile seen by none,
half of the values not copied, the CLS key counted by all four lanes. Backward: stats of another tile, queries behind
the last taken, the CLS missing from the sum of p * dp, its share of the mean left out, lanes not rescaled when they
meet, one sequence left out of the CLS's sum. Places: runs ignored, the inner stride left out, sequences and keys behind
the last, a vector behind the head, an absent row read, the last row stored by its neighbour, the CLS found in the other
half, parts of another head. Sums: p not normalised, the sum of p dp left out, not rescaled, the CLS's v, its dq or the
mean left out, rows of the CLS unwritten, one head of a group for all or one skipped, ds not transposed, blocks of a
matrix not exchanged, a step behind the head taken. Two changes are none: warps behind the last find no rows anyway, and
the barrier between the halves of the fused backward is followed by another before what it guards is read.
"""

from __future__ import annotations

import pytest
import torch

import vkernels as vk
from tests.ops.test_divided_attention import by_hand, make
from vkernels import library
from vkernels.ops.divided_attention import torch_op

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

FWD, BWD = (getattr(torch.ops.vkernels, f"divided_attention_{name}").cuda for name in ("fwd", "bwd"))


def weight_like(o):
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o.dtype)


def run(q, k, v, grid, **options):
    """(o, dq, dk, dv) on the CUDA kernels."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = vk.divided_attention(*leaves, grid, **options, backend="cuda")
    return o.detach(), *torch.autograd.grad((o * weight_like(o)).sum(), leaves)


def expected(q, k, v, grid, axis="temporal", cls=0, order="frame", frames_per_group=None):
    """(o, dq, dk, dv) group by group in float64."""
    frames = frames_per_group or (grid.t if axis == "temporal" else 1)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o = by_hand(*leaves, grid.t, grid.h * grid.w, axis, cls, order, frames)
    return o.detach(), *torch.autograd.grad((o * weight_like(q).double()).sum(), leaves)


def close(got, want, dtype):
    """Within a few roundings of the largest value: weights and their gradients are rounded before each product."""
    ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, g, w in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        assert g.dtype == dtype
        worst = (g.double() - w).abs().max().item()
        assert worst <= 3 * ulp * max(w.abs().max().item(), 1.0), (name, worst)


def agree(b, grid, d, n=1, m=1, dtype=torch.float16, **options):
    s = options.get("cls", 0) + grid.tokens
    packed = make(b, s, n + 2 * m, d)[0].to(dtype)  # q, k, v are slices of one row
    q, k, v = packed.split([n, m, m], dim=2)
    close(run(q, k, v, grid, **options), expected(q, k, v, grid, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("d", [8, 40, 64, 72, 80, 88, 96, 104, 128])
def test_head_sizes(d, dtype):
    """One run of every kernel: packed, tiled, tiled with a shared CLS."""
    agree(1, vk.Grid(5, 1, 4), d, n=2, m=2, dtype=dtype)
    agree(1, vk.Grid(18, 1, 1), d, dtype=dtype)
    agree(1, vk.Grid(2, 1, 17), d, dtype=dtype, axis="spatial", cls=1)


@pytest.mark.parametrize("d", [64, 72, 88, 128])
@pytest.mark.parametrize("order", ["b s three n d", "b s n three d", "b three n s d"])
def test_a_packed_qkv_is_read_where_it_lies(monkeypatch, order, d):
    """The kernels, whose every access is checked, get the slices themselves: 16 bytes at a time needs no copy."""
    grid, sizes = vk.Grid(4, 1, 3), {"b": 2, "s": 12, "three": 3, "n": 2, "d": d}
    axes = order.split()
    packed = torch.randn(*(sizes[axis] for axis in axes), generator=torch.Generator().manual_seed(1)).bfloat16()
    q, k, v = packed.permute(*(axes.index(axis) for axis in sizes if axis != "three"), axes.index("three")).unbind(-1)
    seen = []

    def watched(name, tensors, *numbers):
        seen.append([x.data_ptr() for x in tensors if x is not None])
        library.run_cuda(name, tensors, *numbers)

    monkeypatch.setattr(torch_op, "run_cuda", watched)
    close(run(q, k, v, grid), expected(q, k, v, grid), torch.bfloat16)
    pointers = [x.data_ptr() for x in (q, k, v)]
    assert seen[0][:3] == pointers
    assert seen[1][1:4] == pointers


# A warp has 16 rows: 16 // f sequences. The last warp of a block, its last sequences and rows behind them are partial.
PACKED = [
    ("one frame", vk.Grid(1, 1, 37), {}),
    ("two sequences to a warp", vk.Grid(8, 1, 3), {"cls": 1}),
    ("two rows nobody has", vk.Grid(7, 1, 5), {"cls": 1, "order": "patch"}),
    ("a sequence to a warp", vk.Grid(9, 1, 2), {"cls": 1}),
    ("a sequence is a warp", vk.Grid(16, 1, 2), {"order": "patch"}),
    ("groups of frames", vk.Grid(6, 1, 3), {"frames_per_group": 3, "cls": 1}),
    ("patches", vk.Grid(3, 1, 5), {"axis": "spatial"}),
    ("patches of frames far apart", vk.Grid(4, 1, 3), {"axis": "spatial", "frames_per_group": 2, "order": "patch"}),
]


@pytest.mark.parametrize("heads", [(3, 3), (4, 2)], ids=["own", "shared"])
@pytest.mark.parametrize(("grid", "options"), [pytest.param(*b[1:], id=b[0]) for b in PACKED])
def test_packed(grid, options, heads):
    agree(2, grid, 24, *heads, **options)


# 16 rows to a warp, 6 warps to a block; tiles of 64 rows pass by, in steps of 16.
TILED = [
    ("one more than packed", vk.Grid(17, 1, 2), {"cls": 1}),
    ("a tile", vk.Grid(64, 1, 1), {"order": "patch"}),
    ("a row in the second tile", vk.Grid(65, 1, 1), {}),
    ("two blocks", vk.Grid(100, 1, 1), {"cls": 1}),
    ("a stage filled twice", vk.Grid(130, 1, 1), {}),
    ("the CLS fills a warp", vk.Grid(2, 1, 15), {"axis": "spatial", "cls": 1}),
    ("the CLS alone in a warp", vk.Grid(3, 4, 4), {"axis": "spatial", "cls": 1, "order": "patch"}),
    ("the CLS in the second block", vk.Grid(1, 8, 12), {"axis": "spatial", "cls": 1}),
    ("a single patch", vk.Grid(3, 1, 1), {"axis": "spatial", "cls": 1}),
    ("frames far apart", vk.Grid(6, 1, 23), {"axis": "spatial", "cls": 1, "frames_per_group": 3}),
    ("no CLS", vk.Grid(2, 3, 7), {"axis": "spatial", "order": "patch"}),
]


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)], ids=["own", "shared"])
@pytest.mark.parametrize(("grid", "options"), [pytest.param(*b[1:], id=b[0]) for b in TILED])
def test_tiled(grid, options, heads):
    agree(1 + (grid.tokens < 20), grid, 24, *heads, **options)


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
@pytest.mark.parametrize("grid", [vk.Grid(0, 1, 2), vk.Grid(2, 0, 1)], ids=["no frames", "no patches"])
def test_a_cls_alone(axis, grid):
    """With no patches each frame's softmax sees the CLS only: its output is v. With no frames there is none."""
    q, k, v = (x.half() for x in make(2, 1, 2, 8, m=1))
    o, dq, dk, dv = run(q, k, v, grid, axis=axis, cls=1)
    sees = axis == "spatial" and grid.t > 0
    torch.testing.assert_close(o, v.repeat_interleave(2, dim=2) if sees else torch.zeros_like(q))
    want = weight_like(o).sum(2, keepdim=True) if sees else torch.zeros_like(v)
    torch.testing.assert_close(dv, want)
    for grad in (dq, dk):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-3)


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_the_order_of_threads_does_not_matter(axis):
    """No bit depends on which thread or warp comes first."""
    set_order = library.emulator.module.set_order
    q, k, v = (x.bfloat16() for x in make(1, 1 + 18 * 18, 2, 16, m=1))
    found = []
    try:
        for order in (0, 1, 2):  # forward, backward, shuffled
            set_order(order)
            found.append(run(q, k, v, vk.Grid(18, 3, 6), axis=axis, cls=1))
    finally:
        set_order(3)  # mixed
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("t", [5, 17])
def test_layouts_nobody_else_has(t):
    """Heads outermost, an expanded batch, a strided last dimension, rows off the multiples of 16 bytes."""
    grid, b, n, d = vk.Grid(t, 1, 3), 2, 2, 16
    s = grid.tokens
    q = make(1, n, s, d)[0].half().transpose(1, 2).expand(b, s, n, d)
    k = make(b, s, d, n, seed=1)[0].half().transpose(2, 3)
    v = torch.empty(b, s, n, d + 4, dtype=torch.float16)[..., 4:].copy_(make(b, s, n, d, seed=2)[0])
    close(run(q, k, v, grid), expected(q, k, v, grid), torch.float16)


@pytest.mark.parametrize(("axis", "t", "patches"), [("temporal", 8, 4), ("temporal", 70, 1), ("spatial", 2, 70)])
def test_large_scores(axis, t, patches):
    """Scores of several hundred: only the largest of a row counts, and nothing overflows."""
    q, k, v = (x.bfloat16() for x in make(1, 1 + t * patches, 1, 64))
    grid, options = vk.Grid(t, 1, patches), {"axis": axis, "cls": 1}
    got = vk.divided_attention(q * 16, k * 16, v, grid, **options, backend="cuda")
    want = by_hand(q * 16, k * 16, v, t, patches, axis, 1, "frame", t if axis == "temporal" else 1)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("t", [16, 20])
def test_sequences_of_their_own_keep_their_nan(t):
    """What is not finite stays in its sequence, unless sequences share a warp."""
    q, k, v = (x.bfloat16() for x in make(1, 3 * t, 1, 16))
    v[:, 1::3] = torch.nan
    o = vk.divided_attention(q, k, v, vk.Grid(t, 1, 3), backend="cuda")
    assert o[:, 1::3].isnan().all()
    assert o[:, 0::3].isfinite().all()
    assert o[:, 2::3].isfinite().all()


def test_why_not_in_sentences():
    grid = vk.Grid(4, 1, 1)
    q = torch.zeros(1, 4, 1, 136, dtype=torch.bfloat16)
    for message, x, options in (
        ("dtype float32 has no tensor cores to run on", q[..., :8].float(), {}),
        ("head size 136 is not a multiple of 8 up to 128", q, {}),
        ("head size 12 is not a multiple of 8 up to 128", q[..., :12], {}),
        ("scale -1.0 is not positive", q[..., :8], {"scale": -1.0}),
    ):
        with pytest.raises(vk.NoBackend, match=message):
            vk.divided_attention(x, x, x, grid, **options, backend="cuda")


def test_a_direct_call_is_refused_before_it_could_read_outside():
    q, k, v = (x.half() for x in make(1, 4, 2, 8))
    for message, args in (
        ("q must have one token per patch", (q, k, v, 1.0, [3, 2, 0, 0, 0, 1])),
        ("frames_per_group must divide", (q, k, v, 1.0, [4, 1, 0, 0, 0, 3])),
        ("frames_per_group must divide", (q, k, v, 1.0, [4, 1, 0, 0, 0, 0])),
        ("grid must have sizes", (q, k, v, 1.0, [-4, -1, 0, 0, 0, 1])),
        ("cls must be 0 or 1", (q, k, v, 1.0, [2, 1, 2, 0, 0, 1])),
        ("layout must hold 6 numbers", (q, k, v, 1.0, [4, 1, 0, 0, 0])),
        ("v must have size", (q, k, v[:, :3], 1.0, [4, 1, 0, 0, 0, 4])),
        ("k must have dtype", (q, k.bfloat16(), v, 1.0, [4, 1, 0, 0, 0, 4])),
        ("q must have dtype bfloat16", (q.float(), k.float(), v.float(), 1.0, [4, 1, 0, 0, 0, 4])),
        ("q must have a head size", (q[..., :4], k[..., :4], v[..., :4], 1.0, [4, 1, 0, 0, 0, 4])),
        ("scale must be positive", (q, k, v, 0.0, [4, 1, 0, 0, 0, 4])),
    ):
        with pytest.raises(ValueError, match=f"divided_attention: {message}"):
            FWD(*args)
        with pytest.raises(ValueError, match=f"divided_attention: {message}"):
            BWD(args[0], *args)
    with pytest.raises(ValueError, match="divided_attention: grad_o must have size"):
        BWD(q[:, :3], q, k, v, 1.0, [4, 1, 0, 0, 0, 4])


def test_scratch_that_is_too_small_is_refused():
    """Native functions are told where to leave what kernels share; less than they need is refused."""
    ref, emulator = library.ref, library.emulator
    q, k, v = (x.half() for x in make(1, 1 + 2 * 4, 2, 8))
    out, grads = torch.empty_like(q), [torch.empty_like(q) for _ in range(3)]
    layout, part, stats = [2, 4, 1, 1, 0, 1], torch.empty(2 * 2 * 8), torch.empty(2 * 2 * 2 * 5)
    fwd = [ref(x) for x in (q, k, v, out)]
    bwd = [ref(x) for x in (out, q, k, v, *grads)]
    emulator.divided_attention_fwd_cuda(*fwd, ref(part), None, 1.0, layout, False, 0, 0)
    emulator.divided_attention_bwd_cuda(*bwd, ref(stats), *[ref(part)] * 3, None, 1.0, layout, False, 0, 0)
    for name, call in (
        ("part", lambda: emulator.divided_attention_fwd_cuda(*fwd, ref(part[1:]), None, 1.0, layout, False, 0, 0)),
        ("part", lambda: emulator.divided_attention_fwd_cuda(*fwd, None, None, 1.0, layout, False, 0, 0)),
        ("stats", lambda: emulator.divided_attention_bwd_cuda(
            *bwd, ref(stats[4:]), *[ref(part)] * 3, None, 1.0, layout, False, 0, 0)),
        ("part_v", lambda: emulator.divided_attention_bwd_cuda(
            *bwd, ref(stats), ref(part), ref(part), ref(part.double()), None, 1.0, layout, False, 0, 0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"divided_attention: {name} must be aligned float32"):
            call()
