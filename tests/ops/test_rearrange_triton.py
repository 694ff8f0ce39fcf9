"""The Triton kernels of rearrange where specs do not look: tile borders, hostile row numbers in direct calls, sums over
chunks, what one call launches, and that lengths do not compile anew. Numbers are torch's or worked by hand.

Planted and seen red here: a row number not compared with the rows there are, the same for targets in `out`, a range of
taps that wraps (it hangs), the last tap skipped, an empty row of a maximum left at -inf, NaN lost by a maximum, ties
not counted, the rows of a second source numbered from 0, a second row axis with the stride of the first, weights of
another sample, a scale dropped forward and backward, the mean of columns past the row, a sign in the norm's gradient,
rows of the next chunk counted twice, the last row of a chunk left out, NaN of absent rows in the parameters' sums, the
edge of a turned tile, a repeated axis given a stride, a step one past the end of x. Of rows in parts: the mean of g
left out, its product not divided by the deviation, the mean of one part for all, the sums of row 0 for every row, the
norm's weights left out of them. Of odd runs: steps in elements, an address between two units.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import einops
import pytest
import torch
import torch.nn.functional as F

import vkernels as vk
from vkernels import rearrangement as plans
from vkernels.library import INTERPRETED, op
from vkernels.testing import guarded_memory, poisoned_memory, strided
from vkernels.triton.launch import recording

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)"),
]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="these tensors are on the CPU, where the interpreter runs")


def run(x, plan, **how):
    return vk.rearrange(x, plan, backend="triton", **how)


def ints(*rows):
    return torch.tensor(rows, dtype=torch.int32)


# ---- rows ----------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # rows that are not there, at eps 0
def test_norms_and_their_gradients_by_hand():
    """(3, 4) has root mean square sqrt(12.5); (1, 3) has mean 2 and deviation 1; two normalised numbers never move."""
    x = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    plan = plans.keep(indices=torch.tensor([0]), n=1)
    y = run(x, plan, norm="rms", eps=0.0)
    y[..., 0].sum().backward()
    torch.testing.assert_close(y[0, 0], torch.tensor([0.848528, 1.131371]))
    torch.testing.assert_close(x.grad[0, 0], torch.tensor([0.64, -0.48]) / 12.5**0.5)
    x = torch.tensor([[[1.0, 3.0]]], requires_grad=True)
    weight, bias = torch.tensor([2.0, 5.0], requires_grad=True), torch.tensor([0.5, 0.0], requires_grad=True)
    y = run(x, plan, norm="layer", eps=0.0, norm_weight=weight, norm_bias=bias)
    y.sum().backward()
    torch.testing.assert_close(y[0, 0], torch.tensor([-1.5, 5.0]))
    torch.testing.assert_close(x.grad[0, 0], torch.zeros(2))
    assert weight.grad.tolist() == [-1, 1]  # the empty rest of a tile of rows adds nothing, not even at eps 0
    assert bias.grad.tolist() == [1, 1]


@interpreted
@pytest.mark.parametrize("c", [1, 15, 33])
def test_borders_of_row_tiles(c):
    """More rows than chunks, rows that end inside a tile of 64 elements, a row that is no power of two."""
    x, residual = torch.randn(3, 11, c), torch.randn(3, 9, c)
    keep = torch.stack([torch.randperm(11)[:9] for _ in range(3)])
    vectors = [torch.randn(c) for _ in range(4)]
    leaves = [t.clone().requires_grad_() for t in (x, residual, *vectors)]

    def fused(x, residual, bias, gate, weight, shift):
        plan = plans.keep(indices=keep, n=11)
        return run(
            x, plan, bias=bias, gate=gate, scale=0.5, residual=residual, norm="layer", norm_weight=weight,
            norm_bias=shift, return_sum=True,
        )  # fmt: skip

    def composed(x, residual, bias, gate, weight, shift):
        u = residual + 0.5 * gate * (x.gather(1, keep[..., None].expand(-1, -1, c)) + bias)
        return F.layer_norm(u, (c,), weight, shift), u

    along = torch.randn(2, 3, 9, c)
    results = []
    for f in (fused, composed):
        y, u = f(*leaves)
        results.append((y, u, *torch.autograd.grad((y * along[0] + u * along[1]).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@interpreted
@interpreted
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # rows that are not there, at eps 0
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("c", [16, 33])
def test_rows_too_long_for_registers_are_undone_in_parts(monkeypatch, norm, c):
    """Registers of 32 numbers: 16 channels without a bias stay whole, 33 with one go in parts of 16."""
    from vkernels.ops.rearrange import triton_backward

    monkeypatch.setattr(triton_backward, "WHOLE", 32)
    g = torch.Generator().manual_seed(c)
    x, residual = (torch.randn(1, 3, c, generator=g, requires_grad=True) for _ in range(2))
    weight, shift, bias, gate = (torch.randn(c, generator=g, requires_grad=True) for _ in range(4))
    all_ = c == 33
    more = {"bias": bias, "gate": gate, "norm_bias": shift} if all_ else {}
    y, u = run(
        x, plans.keep(indices=torch.tensor([2, 0]), n=3), norm=norm, norm_weight=weight, residual=residual[:, :2],
        scale=0.5, return_sum=True, eps=1e-3, **more,
    )  # fmt: skip
    leaves = [x, residual, weight, *more.values()]
    dy, du = (torch.randn(y.shape, generator=g) for _ in range(2))
    got = torch.autograd.grad([y, u], leaves, [dy, du])
    v = x[:, [2, 0]].double()
    want_u = residual[:, :2].double() + 0.5 * (gate * (v + bias) if all_ else v)
    last = shift.double() if all_ else None
    want_y = (
        F.layer_norm(want_u, (c,), weight.double(), last, 1e-3)
        if norm == "layer"
        else want_u * torch.rsqrt((want_u**2).mean(-1, keepdim=True) + 1e-3) * weight + (0 if last is None else last)
    )
    want = torch.autograd.grad([want_y, want_u], leaves, [dy.double(), du.double()])
    for g_, w in zip([y, u, *got], [want_y, want_u, *want], strict=True):
        torch.testing.assert_close(g_.double(), w.double(), rtol=1e-4, atol=2e-5)


def test_a_source_may_have_three_axes_and_four_sources_meet():
    x = torch.randn(2, 4, 5, 6, 8)[:, 1:3, 1:, ::2].requires_grad_()
    others = [torch.randn(1, n, 8, requires_grad=True) for n in (3, 1)]
    fill = torch.randn(2, 8, requires_grad=True)
    index = torch.tensor([29, 0, 24, 23, 12, 27, 28, 26, 5, -1])
    plan = plans.gather("mix", index, (24, 3, 1), fills=2)
    got = run([x, *others], plan, fill=fill)
    table = [x.flatten(1, 3), *(o.expand(2, -1, -1) for o in others), fill.expand(2, -1, -1), torch.zeros(2, 1, 8)]
    want = torch.cat(table, 1)[:, index]
    assert torch.equal(got, want)
    leaves = [x, *others, fill]
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_rows_of_many_taps_and_of_none():
    x = torch.randn(2, 37 * 3, 20, requires_grad=True)
    mean = run(x, plans.frame_mean(37, 3))
    torch.testing.assert_close(mean, x.view(2, 37, 3, 20).mean(1))
    labels = torch.tensor([[0, 0, 3, 0, -1], [0, 3, 3, 0, 0]])
    got = run(x[:, :5], plans.clusters(labels, 4))
    torch.testing.assert_close(got[0, 0], x[0, [0, 1, 3]].mean(0))
    torch.testing.assert_close(got[1, 3], x[1, [1, 2]].mean(0))  # weights of its own sample
    assert not got[:, 1:3].any()
    weights = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mean, x.view(2, 37, 3, 20).mean(1))]
    torch.testing.assert_close(*weights)


@interpreted
def test_maxima_share_with_every_copy_of_a_winner():
    """Row 1 stands twice in the first output row and ties with row 0 there; row 2 wins alone; NaN stays NaN."""
    plan = plans.gather("copies", torch.tensor([0, 1, 1, 2, 0]), (3,))
    plan = type(plan)("copies", sources=(3,), n_out=3, idx=plan.idx, ptr=ints([0, 3, 5, 5]), reduce="max")
    x = torch.tensor([[[2.0], [2.0], [7.0]]], requires_grad=True)
    y = run(x, plan, scale=3.0)
    assert y.flatten().tolist() == [6, 21, 0]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [1, 2, 3]
    with torch.no_grad():
        x[0, 1] = float("nan")
        assert torch.isnan(run(x, plan).flatten()).tolist() == [True, False, False]


@interpreted
def test_into_sets_adds_drops_and_leaves_the_rest():
    x = torch.tensor([1.0, 2.0, 4.0])[None, :, None].expand(2, 3, 20).contiguous()
    plan = plans.keep(indices=torch.tensor([0, 1, 2]), n=3)
    out = torch.full((2, 4, 23), 10.0)[..., 1:21]
    vk.rearrange(x, plan, out=out, rows=torch.tensor([[3, -1, 0], [1, 2, -1]]), backend="triton")
    assert out[..., 7].tolist() == [[4, 10, 10, 1], [10, 1, 2, 10]]
    vk.rearrange(x, plan, out=out, rows=torch.tensor([3, -1, 0]), accumulate=True, scale=2.0, backend="triton")
    assert out[..., 19].tolist() == [[12, 10, 10, 3], [18, 1, 2, 12]]


# ---- affine --------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("dtype", "s"), [(torch.float64, 1), (torch.bfloat16, 7), (torch.uint8, 8), (torch.bool, 9), (torch.bfloat16, 17)]
)
def test_borders_of_affine_tiles(dtype, s):
    """Turned and copied, both fastest factors on both sides of a tile of 8, read through strange strides."""
    x = torch.randint(0, 2, (2, s, 2, 10)).to(dtype)
    for pattern, sizes in (
        ("b s t c -> b c t s", {}),
        ("b s t (c q) -> (b q) t s c", {"q": 2}),
        ("b s t c -> t b r s c", {"r": 2}),
        ("b s t c -> b (s t c) r", {"r": 3}),
    ):
        plan = plans.from_einops(pattern, **sizes)
        want = einops.repeat(x, pattern, **sizes)
        with poisoned_memory(), guarded_memory():
            assert torch.equal(run(strided(x) if s % 2 else x, plan), want)


@interpreted
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, torch.int32), (torch.float32, torch.int64)], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_odd_runs_move_in_the_largest_units_that_divide_them(dtype, unit, first):
    """14 x 3 channels of a patch are 21 units; of a tensor that begins between two units, 42 elements."""
    plan = plans.from_einops("b (h p) (w q) c -> b (h w) (p q c)", p=2, q=14)
    x = torch.randn(4 * 42 * 3 + 1).to(dtype)[first : first + 4 * 42 * 3].view(1, 4, 42, 3)
    want = einops.rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=2, q=14)
    assert torch.equal(run(x, plan), want)
    with recording("sm90") as noted:
        run(x, plan)
    narrow = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    assert noted[0].arguments["x_ptr"].dtype == (narrow if first else unit)


@interpreted
def test_moves_keep_the_payload_of_a_nan():
    bits = torch.tensor([0x7F800001, 0x7FC00123, -1, 1 << 31 >> 1], dtype=torch.int32).view(1, 4, 1)
    x = bits.view(torch.float32)
    for plan in (plans.merge_order(1, 2, 2), plans.from_einops("b s c -> c s b"), plans.from_einops("b s c -> b s c")):
        assert torch.equal(run(x, plan).view(torch.int32).flatten(), bits.flatten())


# ---- direct calls --------------------------------------------------------------------------------------------------

HOSTILE = [2**31 - 1, -(2**31), 5, -7, 3, 1_000_000]


def rows_op(x, ptr, idx, weight=None, reduce=0, **vectors):
    names = ("bias", "gate", "residual", "norm_weight", "norm_bias")
    extra = [vectors.get(name) for name in names]
    return op("rearrange_rows", "triton")(
        [x], ptr, idx, weight, None, None, None, *extra, reduce, 0, 1.0, 1e-5, False, x.dtype
    )[0]


@interpreted
def test_hostile_row_numbers_read_zeros_and_write_nothing():
    x = torch.randn(1, 5, 20)
    idx = ints(HOSTILE)
    want = torch.zeros(1, 6, 20)
    want[0, 4] = x[0, 3]
    ptr = ints([-5, 3, 2, 2**31 - 1, -(2**31), 5, 6])
    with guarded_memory():
        assert torch.equal(rows_op(x, None, idx), want)
        assert torch.equal(rows_op(x, None, idx, torch.ones(1, 6)), want)
        sums = rows_op(x, ptr, idx)
    assert torch.equal(sums[0, 2], x[0, 3])  # taps 2 to the last
    assert torch.equal(sums[0, 4], x[0, 3])  # taps 0 to 4
    assert not sums[0, [0, 1, 3, 5]].any()
    out = torch.zeros(3, 6, 20)
    op("rearrange_rows_into", "triton")(
        out[1:2], [torch.ones(1, 5, 20)], None, ints([0] * 6), *[None] * 6, idx, 0, 0, 1.0, 0.0, False
    )
    assert out[1, [3, 5]].all()
    assert out.sum() == 40
    with guarded_memory():
        dx = op("rearrange_max_bwd", "triton")(torch.ones(1, 6, 20), x, ptr, idx, ptr[:, :6], idx)
    assert dx.isfinite().all()


@interpreted
def test_direct_calls_are_refused_before_they_could_read_outside():
    x, idx = torch.zeros(2, 5, 8), ints([0, 1])
    for arguments, match in (
        ((x, None, idx.long()), "idx must have dtype torch.int32"),
        ((x, None, idx.expand(3, 2)), "idx must have 1 or 2 samples, got 3|x\\[0\\] must have 1 or 3 samples"),
        ((x, ints([0, 1]).expand(2, 2), idx), "ptr must have shape"),
        ((x, ints([0, 1]).T[:0].T, idx), "ptr must have n_out"),
        ((x, None, idx, torch.ones(1, 3)), "weight must have shape"),
        ((x, None, ints([0, 9, 1])[:, ::2]), "idx must have stride 1"),
        ((x[0], None, idx), "x\\[0\\] must have 1 or"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"rearrange: {match}"):
            rows_op(*arguments)
    for vectors, match in (
        ({"bias": torch.zeros(7)}, r"bias must have shape \(8,\)"),
        ({"residual": torch.zeros(2, 3, 8)}, r"residual must have shape \(2, 2, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"rearrange: {match}"):
            rows_op(x, None, idx, **vectors)
    affine = op("rearrange_affine", "triton")
    with pytest.raises(ValueError, match="steps must stay inside x"):
        affine(torch.zeros(4, 3), [0, 1], [4, 4], [1, 1], [4, 4])
    with pytest.raises(ValueError, match="sizes must multiply to the size of"):
        affine(torch.zeros(4, 4), [0, 1], [4, 4], [1, 1], [4, 5])
    into = op("rearrange_rows_into", "triton")
    with pytest.raises(ValueError, match="out must have stride 1"):
        into(torch.zeros(2, 2, 16)[..., ::2], [x], None, idx, *[None] * 7, 0, 0, 1.0, 0.0, False)


@interpreted
def test_what_it_cannot_serve_it_says():
    x, plan = torch.zeros(1, 4, 8), plans.merge_order(1, 2, 2)
    with pytest.raises(vk.NoBackend, match="dtype float64 is served by the reference only"):
        run(x.double(), plan)
    with pytest.raises(vk.NoBackend, match="32769 channels, a norm takes at most 32768"):
        run(torch.zeros(1, 4, 32769), plan, norm="rms")
    five = plans.gather("five", torch.arange(5), (1,) * 5)
    with pytest.raises(vk.NoBackend, match="5 sources, it takes at most 4, the fill vectors counted as one"):
        run([x[:, :1]] * 5, five)
    apart = torch.zeros(1, 3, 3, 3, 3, 8)[:, ::2, ::2, ::2, :2]
    with pytest.raises(vk.NoBackend, match="rows lie on more than 3 axes of unrelated strides"):
        run(apart, plans.keep(indices=torch.arange(2), n=16))


def test_a_plan_goes_to_a_device_once():
    plan = plans.temporal(2, 3)
    assert plan.to("cpu") is plan.to("cpu")
    moved = plan.to("meta")
    assert moved.index.device.type == "meta"
    assert plan.to("meta") is moved


# ---- without a GPU -------------------------------------------------------------------------------------------------

NOTED = """
import json, torch, vkernels as vk
from vkernels import rearrangement as plans
from vkernels.triton.aot import key
from vkernels.triton.launch import recording
LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 100, 128, 129, 257, 1000, 1024, 4096)
def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
def noted(call, lengths=LENGTHS):
    kept = []
    for s in lengths:
        with recording() as launches:
            y = call(s)
            y.backward(torch.empty_like(y))
        kept.append([(launch.name, key(launch)) for launch in launches])
    return kept
"""


def python(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = [sys.executable, "-W", "ignore", "-c", NOTED + code]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_lengths_do_not_compile_anew_and_a_call_is_one_launch():
    """Per call one kernel forward; backward the epilogue, where there is one, and one kernel per source."""
    launched = python("""
weight = empty(64)
found = {
  "keep": noted(lambda s: vk.rearrange(
      empty(2, s, 64), plans.keep(indices=torch.arange(s), n=s), norm="layer", norm_weight=weight, backend="triton")),
  "move": noted(lambda s: vk.rearrange(
      [empty(2, s, 64), empty(1, 3, 64)], plans.gather("m", torch.arange(s + 3), (s, 3)), backend="triton")),
  "max": noted(lambda s: vk.rearrange(empty(2, 4 * s, 64), plans.pool(s, 2, 2, mode="max"), backend="triton")),
  "affine": noted(lambda s: vk.rearrange(
      empty(2, 3 * s, 4, 64), plans.from_einops("b (s k) t c -> b t k s c", k=3), backend="triton"), LENGTHS[1:]),
}
print(json.dumps({name: [[n for n, _ in kept[-1]], len({k for call in kept for _, k in call})]
                  for name, kept in found.items()}))
""")
    assert launched["keep"] == [["_rows_kernel", "_rows_bwd_kernel", "_rows_kernel"], 3]
    assert launched["move"][0] == ["_move_rows_kernel", "_rows_kernel", "_rows_kernel"]
    assert launched["move"][1] <= 4  # a source whose rows are few against the taps of all takes the tiles of many taps
    assert launched["max"] == [["_rows_kernel", "_max_shares_kernel", "_max_bwd_kernel"], 3]
    assert launched["affine"] == [["_copy_runs_kernel"] * 2, 1]


def test_turned_lengths_do_not_compile_anew():
    """There and back, whatever 16 bytes divide. Of a factor of up to 8 elements the tiles are long: another kernel."""
    code = """
kept = noted(lambda s: vk.rearrange(empty(2, s, 64), plans.from_einops("b s c -> b c s"), backend="triton"), %s)
print(json.dumps(len({k for call in kept for _, k in call})))
"""
    assert python(code % "[s for s in LENGTHS if s > 8] + list(range(70, 4096, 301))") == 1
    assert python(code % "LENGTHS") == 4  # of one element a copy; else short there, short back, or neither


def test_how_long_rows_may_be_to_stay_whole():
    """12,288 channels and more always go in parts, 4,096 never do."""
    from vkernels.ops.rearrange import triton_backward

    weight = torch.zeros(1)
    for c, vectors, kernels in ((4096, 4, 1), (4104, 4, 2), (8192, 2, 1), (12288, 1, 2)):
        x, v = weight.expand(1, 2, c), [None if i >= vectors else weight.expand(c) for i in range(4)]
        index = torch.zeros(1, 2, dtype=torch.int32)
        with recording("sm90") as noted:
            triton_backward.rows_bwd(x, None, [x], None, index, None, *v[2:], None, *v[:2], 0, 1, 1.0, 1e-5)
        assert len(noted) == kernels, (c, vectors)


def test_first_rows_of_the_tables_are_pinned():
    from vkernels.triton.tiles import table

    first = {kernel: rows["sm80"][0] for kernel, rows in table("rearrange").items()}
    assert first["_move_rows_kernel"] == {"bytes": 2, "BLOCK": 4096, "BLOCK_C": 1024, "num_warps": 4}
    assert first["_rows_kernel"] == {"BLOCK": 2048, "BLOCK_C": 1024, "TAPS": 4, "num_warps": 8}
    assert first["_turn_kernel"] == {"bytes": 2, "BLOCK": 4096, "SIDE": 64, "num_warps": 4}
