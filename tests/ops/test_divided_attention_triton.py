"""What is particular to the Triton kernels of divided_attention: tile borders, direct calls, compilations.

Expected values come from groups taken by hand (test_divided_attention.py), never from the reference.

Seen red. Packed: sequences of a tile not kept apart; the row sum of p * dp left out; the CLS rows of o unwritten, or
that of a sample that starts with a tile; one head of a group taken for all. Tiled: the last key past a whole tile
dropped; the CLS key missing from the sum of p * dp; the CLS's normaliser of another head; the CLS mean divided by one
too many; its sum of p * dp not rescaled; the gradient of its own key left out; its rows summed twice; neighbouring
frames taken for those of a group.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

import vkernels as vk
from tests.ops.test_divided_attention import by_hand, make
from tests.test_triton import python
from vkernels.remember import forget

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these tests want the interpreter"),
]


def run(q, k, v, grid, **options):
    """(o, dq, dk, dv) on Triton."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = vk.divided_attention(*leaves, grid, **options, backend="triton")
    return o.detach(), *torch.autograd.grad((o * weight_like(o)).sum(), leaves)


def weight_like(o):
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o.dtype)


def expected(q, k, v, grid, axis="temporal", cls=0, order="frame", frames_per_group=None):
    """(o, dq, dk, dv) group by group in float64."""
    frames = frames_per_group or (grid.t if axis == "temporal" else 1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = by_hand(*leaves, grid.t, grid.h * grid.w, axis, cls, order, frames)
    return o.detach(), *torch.autograd.grad((o * weight_like(q)).sum(), leaves)


# A tile of the interpreter has 16 rows. Packed: 16 // f sequences; the last tile, and the rows past them, are partial.
BORDERS = [
    ("one frame", vk.Grid(1, 1, 17), {}),
    ("tiles end inside a sample", vk.Grid(7, 1, 3), {"cls": 1}),
    ("a tile is one sequence", vk.Grid(16, 1, 1), {"cls": 1, "order": "patch"}),
    ("just over a tile", vk.Grid(17, 1, 1), {"cls": 1}),
    ("groups of frames in a tile", vk.Grid(6, 1, 2), {"frames_per_group": 3, "order": "patch"}),
    ("patches packed", vk.Grid(3, 1, 5), {"axis": "spatial"}),
    ("pairs of frames packed", vk.Grid(4, 1, 3), {"axis": "spatial", "frames_per_group": 2}),
    ("patches fill a tile", vk.Grid(2, 4, 4), {"axis": "spatial", "cls": 1}),
    ("one patch past a tile", vk.Grid(1, 1, 17), {"axis": "spatial", "cls": 1, "order": "patch"}),
    ("three frames far apart", vk.Grid(6, 1, 6), {"axis": "spatial", "cls": 1, "frames_per_group": 3}),
]


@pytest.mark.parametrize(("grid", "options"), [pytest.param(*b[1:], id=b[0]) for b in BORDERS])
def test_borders(grid, options):
    b, heads, kv, d = (2 if grid.tokens < 22 else 1), 2, 1, 24
    packed = make(b, options.get("cls", 0) + grid.tokens, heads + 2 * kv, d)[0]
    q, k, v = packed.split([heads, kv, kv], dim=2)
    for got, want in zip(run(q, k, v, grid, **options), expected(q, k, v, grid, **options), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
@pytest.mark.parametrize("grid", [vk.Grid(0, 1, 2), vk.Grid(2, 0, 1)], ids=["no frames", "no patches"])
def test_a_cls_alone(axis, grid):
    """With no patches each frame's softmax sees the CLS only: its output is v. With no frames there is none."""
    q, k, v = make(2, 1, 2, 8, m=1)
    o, dq, dk, dv = run(q, k, v, grid, axis=axis, cls=1)
    sees = axis == "spatial" and grid.t > 0
    torch.testing.assert_close(o, v.repeat_interleave(2, dim=2) if sees else torch.zeros_like(q))
    want = weight_like(o).sum(2, keepdim=True) if sees else torch.zeros_like(v)
    torch.testing.assert_close(dv, want)
    for grad in (dq, dk):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_runs_are_bit_equal(axis):
    q, k, v = make(1, 1 + 3 * 6, 2, 16, m=1)
    options = {"axis": axis, "cls": 1}
    first, again = (run(q, k, v, vk.Grid(3, 2, 3), **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_wide_offsets_give_the_same_bits(axis, monkeypatch):
    """Offsets of 64 bits, which only tensors of more than 2^31 elements need."""
    from vkernels.ops.divided_attention import triton

    q, k, v = make(1, 1 + 3 * 6, 1, 16)
    narrow = run(q, k, v, vk.Grid(3, 2, 3), axis=axis, cls=1)
    monkeypatch.setattr(triton, "_extent", lambda axes, *tensors: 2**31)
    forget()
    wide = run(q, k, v, vk.Grid(3, 2, 3), axis=axis, cls=1)
    forget()
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_layouts_nobody_else_has():
    """Heads outermost, tokens reversed in memory order, a batch that is expanded: strides are all that matters."""
    grid, b, n, d = vk.Grid(5, 1, 3), 2, 2, 16
    q = make(1, n, 15, d)[0].transpose(1, 2).expand(b, 15, n, d)
    k = make(15, b, n, d, seed=1)[0].transpose(0, 1)
    v = make(b, 15, d, n, seed=2)[0].transpose(2, 3)  # the last dimension is strided
    got = vk.divided_attention(q, k, v, grid, backend="triton")
    want = by_hand(q, k, v, 5, 3, "temporal", 0, "frame", 5)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_a_direct_call_is_refused_before_it_could_read_outside():
    q, k, v = make(1, 4, 2, 8)
    fwd, bwd = (getattr(torch.ops.vkernels, f"divided_attention_{name}").triton for name in ("fwd", "bwd"))
    for message, args in (
        ("q must have cls \\+ t\\*l = 6 tokens", (q, k, v, 1.0, [3, 2, 0, 0, 0, 1])),
        ("layout must name frames", (q, k, v, 1.0, [4, 1, 0, 0, 0, 3])),
        ("layout must name frames", (q, k, v, 1.0, [4, 1, 0, 0, 0, 0])),
        ("layout must name frames", (q, k, v, 1.0, [-4, -1, 0, 0, 0, 1])),
        ("layout must name frames", (q, k, v, 1.0, [2, 1, 2, 0, 0, 1])),
        ("layout must hold 6 numbers", (q, k, v, 1.0, [4, 1, 0, 0, 0])),
        ("v must have shape", (q, k, v[:, :3], 1.0, [4, 1, 0, 0, 0, 4])),
        ("k must have shape", (q, k[..., :4], v, 1.0, [4, 1, 0, 0, 0, 4])),
    ):
        with pytest.raises(ValueError, match=f"divided_attention: {message}"):
            fwd(*args)
        with pytest.raises(ValueError, match=f"divided_attention: {message}"):
            bwd(q, *args)
    with pytest.raises(ValueError, match="divided_attention: grad_o must have shape"):
        bwd(q[:, :3], q, k, v, 1.0, [4, 1, 0, 0, 0, 4])


@pytest.mark.parametrize("d", [4, 20, 264])
def test_a_head_size_it_cannot_serve(d):
    q, k, v = make(1, 2, 1, d)
    with pytest.raises(vk.NoBackend, match=f"head size {d} is not a multiple of 8 up to 256"):
        vk.divided_attention(q, k, v, vk.Grid(2, 1, 1), backend="triton")


def test_the_first_rows_of_the_table_are_pinned():
    from vkernels.triton.tiles import table

    first = {kernel: rows["sm90"][0] for kernel, rows in table("divided_attention").items() if "sm90" in rows}
    assert first == {
        "_short_fwd_kernel": {"d": 96, "bytes": 2, "ROWS": 64, "num_warps": 4, "num_stages": 1},
        "_short_bwd_kernel": {"d": 64, "bytes": 2, "ROWS": 64, "num_warps": 4, "num_stages": 1},
        "_long_fwd_kernel": {"d": 128, "bytes": 2, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        "_long_dq_kernel": {"d": 96, "bytes": 2, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        "_long_dkv_kernel": {"d": 64, "bytes": 2, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    }


LENGTHS = """
import json, torch, vkernels as vk
from vkernels.triton.aot import key
from vkernels.triton.launch import recording

def compilations(calls):
    with recording() as noted:
        for grid, options in calls:
            q, k, v = (torch.empty(2, 1 + grid.tokens, 12, 64, dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
            o = vk.divided_attention(q, k, v, grid, cls=1, backend="triton", **options)
            o.backward(torch.empty_like(o))
    return sorted(f"{one.name} x{sum(key(other) == key(one) for other in noted)}"
                  for one in {key(one): one for one in noted}.values())

t = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 50, 63, 64]
longer = [65, 66, 79, 80, 96, 100, 127, 128, 129, 160, 200, 255, 256, 257, 300, 320, 384, 400, 512, 1000]
print(json.dumps([compilations([(vk.Grid(i, 1, 3), {}) for i in t]),
                  compilations([(vk.Grid(i, 1, 2), {}) for i in longer]),
                  compilations([(vk.Grid(i % 5 + 2, 1, i), {"axis": "spatial"}) for i in t])]))
"""


def test_lengths_do_not_compile_anew():
    """Twenty lengths, one compilation of each kernel; sequences that fit a tile and longer ones are two classes."""
    short, longer, spatial = json.loads(python("-c", LENGTHS))
    assert short == ["_short_bwd_kernel x20", "_short_fwd_kernel x20"]
    assert longer == ["_cls_sum_kernel x40", *(f"_long_{x}_kernel x20" for x in ("dkv", "dq", "fwd"))]
    assert spatial == longer
