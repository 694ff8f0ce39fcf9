"""divided_attention(rope=) on the CUDA kernels, emulated: where they rotate inside, and where apply_rope does it first.

Expected values come from q and k turned as complex numbers (test_divided_attention_rope.py), never from the reference.

Planted one at a time in csrc/divided_attention/, each seen red here. Angles: turned the other way (halves; neighbours),
sines read where cosines lie, those of the first chunk or of the first row for all, the rows of a lane exchanged, groups
of frames that share the first one's, the frame not counted, all samples by the first one's, an absent row's read, a
vector behind the head. Turning: k left out (halves; neighbours), halves taken for neighbours, the other half of 128 one
chunk on. Gradients: dq or dk not turned back, dv turned back, turned on instead of back (halves; neighbours). In
vkernels/ops/divided_attention/: the spec's scale left out, the kind of pairs exchanged, angles lost for the backward.
In tiles. Waiting: no barrier after a tile is turned, none before (forward, queries, keys), rows held not waited for or
not committed, no barrier of the warp before they are turned or before floats are read. Turning: the second tile by
the rows of the first, rows held by those of the first warp, v for k, rows behind the last 16 or the last row left out,
rows held left out, a tile that stays turned again, a partner one piece before, the second piece of neighbours by the
first's angles, a four behind the head, frames of groups or samples shared. Gradients: dq or dk not turned back, turned
on, by the rows of the first warp, not scaled, a row behind the last stored. Choice: packed though a pair lies in two
lanes or heads share a key, 129 frames taken, the kind of pairs lost.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import vkernels as vk
from tests.ops.test_divided_attention import make
from tests.ops.test_divided_attention_cuda import BWD, FWD, close
from tests.ops.test_divided_attention_rope import LINE, rope_by_hand, with_gradients
from vkernels import RopeSpec, library
from vkernels.ops.divided_attention import api, torch_op

TIMES = torch.arange(129) + torch.arange(129) // 3 * 2  # 0 1 2 5 6 7 10 ..


def spec_of(d, layout, **more):
    return RopeSpec.build(d, 50.0, layout=layout, **more)


def inputs(b, grid, n, d, dtype, cls=0, m=None):
    """q, k, v as slices of one packed row."""
    m = m or n
    return make(b, cls + grid.tokens, n + 2 * m, d)[0].to(dtype).split([n, m, m], dim=2)


def run(q, k, v, grid, rope, **options):
    """(o, dq, dk, dv), and the kernels of the forward."""

    def call(*leaves):
        return vk.divided_attention(*leaves, grid, rope=rope, **options, backend="cuda")

    with torch.no_grad():
        names = [launch[0] for launch in library.cuda_launches(lambda: call(q, k, v))]
    return with_gradients(call, q, k, v), names


INSIDE = [
    ("halves of 64", 64, "half", vk.Grid(8, 1, 3), {"cls": 1}),
    ("halves of 128, rows nobody has", 128, "half", vk.Grid(7, 1, 3), {"cls": 1}),
    ("neighbours of 64", 64, "pair", vk.Grid(16, 1, 1), {}),
    ("neighbours of 72, patch-major", 72, "pair", vk.Grid(5, 1, 3), {"order": "patch", "cls": 1}),
    ("neighbours of 88", 88, "pair", vk.Grid(9, 1, 2), {}),
    ("neighbours of 120", 120, "pair", vk.Grid(3, 1, 3), {}),
    ("neighbours of 8", 8, "pair", vk.Grid(2, 1, 9), {}),
    ("groups keep their frames", 64, "half", vk.Grid(6, 1, 3), {"frames_per_group": 3, "cls": 1}),
    ("groups of neighbours", 24, "pair", vk.Grid(6, 1, 2), {"frames_per_group": 2, "order": "patch"}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("d", "layout", "grid", "options"), [pytest.param(*c[1:], id=c[0]) for c in INSIDE])
def test_inside(monkeypatch, d, layout, grid, options, dtype):
    """One launch after that for the angles; o has the bits that apply_rope and the plain kernel give."""
    rope = spec_of(d, layout), TIMES[: grid.t]
    q, k, v = inputs(2, grid, 1 + (d < 64), d, dtype, options.get("cls", 0))
    got, names = run(q, k, v, grid, rope, **options)
    assert names[0].startswith("apply_rope")
    assert names[1:] == ["divided_attention, packed_forward"]
    close(got, with_gradients(lambda *x: rope_by_hand(*x, grid, rope, **options), q, k, v), dtype)
    monkeypatch.setattr(api, "composed_because", lambda call: "asked to")
    composed, _ = run(q, k, v, grid, rope, **options)
    assert torch.equal(got[0], composed[0])
    assert torch.equal(got[3], composed[3])


# Longer sequences are turned where their tiles pass by: 16 rows to a warp, 6 warps to a block, 64 rows to a tile.
TILED = [
    ("one more than packed", 64, "half", vk.Grid(17, 1, 2), {"cls": 1}),
    ("three warps", 72, "half", vk.Grid(33, 1, 1), {"order": "patch", "cls": 1}),
    ("a tile", 80, "half", vk.Grid(64, 1, 1), {}),
    ("a row in the second tile", 88, "half", vk.Grid(65, 1, 1), {}),
    ("a block", 96, "half", vk.Grid(96, 1, 1), {}),
    ("a row in the second block", 64, "half", vk.Grid(97, 1, 1), {"cls": 1}),
    ("two tiles, two blocks", 128, "half", vk.Grid(128, 1, 1), {}),
    ("neighbours of 128", 128, "pair", vk.Grid(17, 1, 1), {}),
    ("neighbours of 96", 96, "pair", vk.Grid(33, 1, 1), {}),
    ("neighbours of 88, patch-major", 88, "pair", vk.Grid(18, 1, 2), {"order": "patch", "cls": 1}),
    ("neighbours of 80", 80, "pair", vk.Grid(65, 1, 1), {}),
    ("neighbours of 72", 72, "pair", vk.Grid(96, 1, 1), {}),
    ("neighbours of 64", 64, "pair", vk.Grid(128, 1, 1), {"order": "patch"}),
    ("groups keep their frames", 24, "half", vk.Grid(40, 1, 2), {"frames_per_group": 20, "cls": 1}),
    ("heads share a key", 40, "half", vk.Grid(70, 1, 1), {"m": 1}),
    ("heads share a key over two blocks", 8, "pair", vk.Grid(100, 1, 1), {"m": 1}),
]
# Short ones, too, where a pair lies in two lanes or the gradients of heads are summed.
SHORT = [
    ("halves of 88", 88, "half", vk.Grid(16, 1, 1), {"order": "patch"}),
    ("halves of 72, groups", 72, "half", vk.Grid(6, 1, 2), {"frames_per_group": 3, "cls": 1}),
    ("heads share a key", 64, "half", vk.Grid(4, 1, 2), {"m": 1}),
    ("neighbours of heads that share a key", 16, "pair", vk.Grid(5, 1, 1), {"m": 1}),
]


@pytest.mark.parametrize(
    ("d", "layout", "grid", "options"), [pytest.param(*c[1:], id=f"{c[3].t}, {c[0]}") for c in TILED + SHORT]
)
def test_inside_tiles(monkeypatch, d, layout, grid, options):
    """As above, in the kernels of tiles; among them are bf16 and f16, samples with positions of their own."""
    options = dict(options)
    m, b, dtype = options.pop("m", None), 1 + (grid.t < 40), torch.float16 if layout == "half" else torch.bfloat16
    rope = spec_of(d, layout), torch.stack([TIMES[: grid.t] + 3 * i * i for i in range(b)])
    q, k, v = inputs(b, grid, 2 if m else 1, d, dtype, options.get("cls", 0), m)
    got, names = run(q, k, v, grid, rope, **options)
    assert names[0].startswith("apply_rope")
    assert names[1] == "divided_attention, tiled_forward"
    close(got, with_gradients(lambda *x: rope_by_hand(*x, grid, rope, **options), q, k, v), dtype)
    if options.get("frames_per_group", grid.t) > torch_op.PACKED:
        monkeypatch.setattr(api, "composed_because", lambda call: "asked to")
        composed, _ = run(q, k, v, grid, rope, **options)
        assert torch.equal(got[0], composed[0])
        assert torch.equal(got[3], composed[3])


@pytest.mark.parametrize(
    ("t", "names"),
    [
        (16, ["packed_forward", "packed_backward"]),
        (17, ["tiled_forward", "tiled_backward"]),
        (97, ["tiled_forward", "tiled_dq", "tiled_dkv"]),
    ],
)
def test_nothing_but_angles_goes_before(t, names):
    grid = vk.Grid(t, 1, 1)
    q, k, v = inputs(1, grid, 1, 64, torch.bfloat16)
    rope = spec_of(64, "half"), TIMES[:t]
    call = partial(vk.divided_attention, grid=grid, rope=rope, backend="cuda")
    noted = [launch[0] for launch in library.cuda_launches(lambda: with_gradients(call, q, k, v))]
    assert noted[0].startswith("apply_rope")
    assert noted[1:] == [f"divided_attention, {name}" for name in names]


def test_the_order_of_threads_does_not_matter():
    """Rows are turned by threads that do not multiply them."""
    set_order = library.emulator.module.set_order
    grid, found = vk.Grid(70, 1, 1), []
    q, k, v = inputs(1, grid, 1, 24, torch.bfloat16)
    try:
        for order in (0, 1, 2):  # forward, backward, shuffled
            set_order(order)
            found.append(run(q, k, v, grid, (spec_of(24, "half"), TIMES[:70]))[0])
    finally:
        set_order(3)  # mixed
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("layout", "second"), [("half", 32), ("pair", 1)])
def test_two_frames_worked_by_hand(layout, second):
    # As in test_divided_attention_rope.py: a frame turns by 60 degrees, k stands at 30. Scores of frame 0: ln 3 and 0.
    spec = RopeSpec((math.pi / 3, *[0.0] * 31), layout=layout)
    q, k, v = (torch.zeros(1, 2, 1, 64, dtype=torch.float16) for _ in range(3))
    q[..., 0] = 1
    k[..., 0], k[..., second] = math.log(3), math.log(3) * math.tan(math.pi / 6)
    v[0, :, 0, 5] = torch.tensor([4.0, 8.0])
    o = vk.divided_attention(q, k, v, vk.Grid(2, 1, 1), scale=1.0, rope=(spec, torch.arange(2)), backend="cuda")
    torch.testing.assert_close(o[0, :, 0, 5].float(), torch.tensor([5.0, 6.0]), rtol=0, atol=5e-3)


@pytest.mark.parametrize("layout", ["half", "pair"])
def test_positions_of_every_kind(layout):
    """A row for each sample, real positions, several axes, a scale; what the angle of a frame is, is one table."""
    grid, d = vk.Grid(4, 1, 3), 64
    q, k, v = inputs(3, grid, 1, d, torch.float16)
    two = RopeSpec.grid((32, 32), 9.0, layout=layout)
    for spec, pos in (
        (spec_of(d, layout), torch.tensor([[0, 1, 2, 3], [4, 6, 8, 11], [5, 0, 1, 9]])),
        (spec_of(d, layout).replace(scale=1.2), torch.tensor([0.0, 0.7, 1.9, 2.5], dtype=torch.float64)),
        (two, torch.tensor([[0, 1, 2, 3], [5, 5, 7, 7]], dtype=torch.int32)),
    ):
        got, names = run(q, k, v, grid, (spec, pos))
        assert len(names) == 2
        close(got, with_gradients(lambda *x, r=(spec, pos): rope_by_hand(*x, grid, r), q, k, v), torch.float16)


FIRST = [
    ("the axis is spatial", 64, LINE, vk.Grid(2, 1, 3), {"axis": "spatial", "cls": 1}, 1),
    ("129 frames attend together", 8, spec_of(8, "half"), vk.Grid(129, 1, 1), {}, 1),
    ("they rotate whole heads", 64, spec_of(32, "half"), vk.Grid(4, 1, 2), {"cls": 1}, 2),
    ("they rotate whole heads, all alike", 8, RopeSpec.build(8, axes=((0,) * 4,) * 2), vk.Grid(2, 1, 1), {}, 1),
    ("pairs lie as 'axial'", 64, RopeSpec.grid((32, 32), layout="axial"), vk.Grid(2, 1, 1), {}, 1),
]


@pytest.mark.parametrize(("why", "d", "spec", "grid", "options", "per_key"), [pytest.param(*c, id=c[0]) for c in FIRST])
def test_apply_rope_first(why, d, spec, grid, options, per_key):
    """What the kernels do not rotate, another op does, and `explain` says why."""
    count = grid.t if options.get("axis") != "spatial" else grid.h * grid.w
    q, k, v = inputs(1, grid, 2, d, torch.bfloat16, options.get("cls", 0))
    k, v = k[:, :, : 2 // per_key], v[:, :, : 2 // per_key]
    rope = spec, TIMES[:count].expand(spec.n_axes, count)
    got, names = run(q, k, v, grid, rope, **options)
    assert "apply_rope" in names[0]
    if spec.layout != "axial":
        want = with_gradients(lambda *x: rope_by_hand(*x, grid, rope, **options), q, k, v)
        for g, w in zip(got, want, strict=True):
            assert (g.double() - w).abs().max() <= 0.03 * max(w.abs().max(), 1)
    said = str(vk.explain("divided_attention", q, k, v, grid, rope=rope, **options, machine="h200"))
    assert f"rope: not inside the CUDA kernels: {why}" in said


def test_explain_says_that_it_is_inside():
    grid = vk.Grid(4, 1, 2)
    q, k, v = inputs(1, grid, 1, 64, torch.bfloat16)
    call = ("divided_attention", q, k, v, grid)
    said = str(vk.explain(*call, rope=(spec_of(64, "half"), TIMES[:4]), machine="h200"))
    assert "rope: the CUDA kernels turn q and k inside; other backends run apply_rope first" in said
    assert "rope" not in str(vk.explain(*call, machine="h200"))


def test_angles_are_those_of_the_spec():
    """float32 from turns counted in integers: also where a float32 angle would have lost the frame."""
    spec = spec_of(16, "pair").replace(scale=1.5)
    pos = torch.tensor([0, 1, 2**31 - 1])
    angles = torch_op.angles_of(spec, pos.view(1, 1, 3))
    exact = pos.double()[:, None] * torch.tensor(spec.freq, dtype=torch.float64)
    assert angles.shape == (1, 3, 16)
    torch.testing.assert_close(angles[0].double(), 1.5 * torch.cat([exact.cos(), exact.sin()], 1), rtol=0, atol=2e-6)


def test_a_direct_call_is_refused_before_it_could_read_outside():
    q, k, v = (x.half() for x in make(2, 8, 2, 64))
    layout, angles = [4, 2, 0, 0, 0, 4], torch.zeros(1, 4, 64)
    long, halves = (*(x.half() for x in make(1, 129, 1, 8)), 1.0), (*(x.half() for x in make(1, 34, 1, 8)), 1.0)
    for message, args in (
        ("angles must be given in time only", (q, k, v, 1.0, [4, 2, 0, 1, 0, 1], angles, False)),
        ("angles must be given in time only, for at most 128 frames",
         (*long, [129, 1, 0, 0, 0, 129], torch.zeros(1, 129, 8), False)),
        ("angles must have size 34", (*halves, [34, 1, 0, 0, 0, 17], torch.zeros(1, 17, 8), False)),
        ("angles must have size 8", (*halves, [34, 1, 0, 0, 0, 34], torch.zeros(1, 34, 4), False)),
        ("angles must have dtype", (*halves, [34, 1, 0, 0, 0, 34], torch.zeros(1, 34, 8).half(), False)),
        ("angles must have rank 3", (q, k, v, 1.0, layout, angles[0], False)),
        ("angles must have dtype", (q, k, v, 1.0, layout, angles.double(), False)),
        ("angles must have b or 1 samples", (q, k, v, 1.0, layout, angles.expand(3, 4, 64).contiguous(), False)),
        ("angles must have size 4", (q, k, v, 1.0, layout, torch.zeros(1, 3, 64), True)),
        ("angles must have size 64", (q, k, v, 1.0, layout, torch.zeros(1, 4, 32), True)),
        ("angles must be contiguous", (q, k, v, 1.0, layout, torch.zeros(1, 4, 128)[..., ::2], True)),
        ("angles must be contiguous", (q, k, v, 1.0, layout, torch.zeros(257)[1:].view(1, 4, 64), True)),
        ("angles must be contiguous", (q, k, v, 1.0, layout, angles.expand(2, 4, 64), True)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"divided_attention: {message}"):
            FWD(*args)
        with pytest.raises(ValueError, match=f"divided_attention: {message}"):
            BWD(args[0], *args)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_that_do_not_rotate_refuse_angles(backend):
    q, k, v = make(1, 4, 1, 64)
    args = q, k, v, 1.0, [4, 1, 0, 0, 0, 4], torch.zeros(1, 4, 64), False
    fwd, bwd = (getattr(getattr(torch.ops.vkernels, f"divided_attention_{name}"), backend) for name in ("fwd", "bwd"))
    for call in (lambda: fwd(*args), lambda: bwd(q, *args)):
        with pytest.raises(ValueError, match="divided_attention: angles must be None on a backend that does not"):
            call()
