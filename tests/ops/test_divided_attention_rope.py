"""divided_attention(rope=): the witness of every backend; nothing here calls the reference.

Expected values are worked by hand, or groups taken by hand (test_divided_attention.py) of q and k turned as complex
numbers in float64.

Seen red: the CLS at position 1, or behind the others; patch-major tokens by the order of frames; frames taken for
patches; k not turned.
"""

from __future__ import annotations

import math

import pytest
import torch

import vkernels as vk
from tests.ops.test_divided_attention import BACKENDS, by_hand, make
from vkernels import RopeSpec

backends = pytest.mark.parametrize("backend", BACKENDS)


def turned(x, spec, angle):
    """x b s n d in float64, pair j of token s times exp(i angle[b, s, j]); pairs are halves or neighbours."""
    x, r, start = x.double(), spec.pairs, spec.offset
    part = x[..., start : start + 2 * r]
    first, second = (part[..., 0::2], part[..., 1::2]) if spec.layout == "pair" else (part[..., :r], part[..., r:])
    z = torch.complex(first, second) * torch.polar(torch.full_like(angle, spec.scale), angle)[:, :, None]
    both = [z.real, z.imag]
    part = torch.stack(both, -1).flatten(-2) if spec.layout == "pair" else torch.cat(both, -1)
    return torch.cat([x[..., :start], part, x[..., start + 2 * r :]], -1)


def angles(spec, positions, b, t, patches, axis, cls, order):
    """b s r: row by row, the position of its frame or patch; 0 for the CLS. `positions` axes b t|patches."""
    outer, inner = (t, patches) if order == "frame" else (patches, t)
    found = []
    for sample in range(b):
        rows = [[0.0] * spec.n_axes] * cls
        for i in range(outer):
            for j in range(inner):
                frame, patch = (i, j) if order == "frame" else (j, i)
                at = frame if axis == "temporal" else patch
                rows.append([positions[a][sample % len(positions[a])][at] for a in range(spec.n_axes)])
        found.append([[f * row[a] for f, a in zip(spec.freq, spec.axis_rows[0], strict=True)] for row in rows])
    return torch.tensor(found, dtype=torch.float64).view(b, -1, spec.pairs)


def rope_by_hand(q, k, v, grid, rope, axis="temporal", cls=0, order="frame", frames_per_group=None):
    spec, positions = rope
    t, patches = grid.t, grid.h * grid.w
    lists = positions.double().view(spec.n_axes, -1, positions.shape[-1]).tolist()
    angle = angles(spec, lists, q.shape[0], t, patches, axis, cls, order)
    frames = frames_per_group or (t if axis == "temporal" else 1)
    return by_hand(turned(q, spec, angle), turned(k, spec, angle), v, t, patches, axis, cls, order, frames)


def with_gradients(function, q, k, v):
    """(o, dq, dk, dv) of the sum of o times fixed weights."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(q.dtype).double()
    return o.detach(), *torch.autograd.grad((o.double() * weight).sum(), leaves)


@backends
@pytest.mark.parametrize(("layout", "second"), [("half", 4), ("pair", 1)])
def test_two_frames_worked_by_hand(backend, layout, second):
    # One turning pair, by 60 degrees per frame. q = (1, 0) and k = c (cos 30, sin 30) in both frames, c cos 30 = ln 3.
    # The query of frame 0 sees k at 30 and 90 degrees, scores ln 3 and 0: weights 3/4 and 1/4. That of frame 1 sees
    # k at -30 and 30 degrees: one half each. Turned the other way, frame 0 would see halves and frame 1 not.
    spec = RopeSpec((math.pi / 3, 0.0, 0.0, 0.0), layout=layout)
    q, k, v = (torch.zeros(1, 2, 1, 8) for _ in range(3))
    q[..., 0] = 1
    k[..., 0], k[..., second] = math.log(3), math.log(3) * math.tan(math.pi / 6)
    v[0, :, 0, 5] = torch.tensor([4.0, 8.0])
    rope = spec, torch.arange(2)
    o = vk.divided_attention(q, k, v, vk.Grid(2, 1, 1), scale=1.0, rope=rope, backend=backend)
    torch.testing.assert_close(o[0, :, 0, 5], torch.tensor([5.0, 6.0]))
    back = (spec, -torch.arange(2))
    o = vk.divided_attention(q, k, v, vk.Grid(2, 1, 1), scale=1.0, rope=back, backend=backend)
    torch.testing.assert_close(o[0, :, 0, 5], torch.tensor([6.0, 7.0]))


LINE = RopeSpec.build(16, 50.0)
WAYS = [
    ("frames", vk.Grid(5, 1, 3), (LINE, torch.arange(5)), {"cls": 1}),
    ("patch-major", vk.Grid(5, 1, 3), (LINE, torch.arange(5) * 3), {"cls": 1, "order": "patch"}),
    ("groups keep their frames", vk.Grid(6, 1, 2), (LINE, torch.arange(6) ** 2), {"frames_per_group": 3}),
    ("a row for each sample", vk.Grid(4, 1, 2), (LINE, torch.tensor([[0, 1, 2, 3], [4, 6, 8, 11]])), {}),
    ("real positions", vk.Grid(4, 1, 2), (LINE, torch.tensor([0.0, 0.7, 1.9, 2.5])), {}),
    ("two axes", vk.Grid(4, 1, 2), (RopeSpec.grid((8, 8), 9.0), torch.tensor([[0, 1, 2, 3], [5, 5, 7, 7]])), {}),
    ("neighbours, partly", vk.Grid(4, 1, 2), (RopeSpec.build(8, 9.0, layout="pair", offset=4), torch.arange(4)), {}),
    ("a scale", vk.Grid(4, 1, 2), (RopeSpec.build(16, 9.0).replace(scale=1.3), torch.arange(4)), {"cls": 1}),
    (
        "places",
        vk.Grid(2, 2, 3),
        (RopeSpec.grid((8, 8), 9.0), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])),
        {"axis": "spatial", "cls": 1, "order": "patch"},
    ),
    ("places of two frames", vk.Grid(4, 1, 3), (LINE, torch.arange(3)), {"axis": "spatial", "frames_per_group": 2}),
]


@backends
@pytest.mark.parametrize(("grid", "rope", "options"), [pytest.param(*w[1:], id=w[0]) for w in WAYS])
def test_equals_groups_taken_by_hand(backend, grid, rope, options):
    """Forward and gradients; q, k and v are slices of one packed row."""
    packed = make(2, options.get("cls", 0) + grid.tokens, 4, 16)[0]
    parts = packed.split([2, 1, 1], dim=2)
    got = with_gradients(lambda *x: vk.divided_attention(*x, grid, rope=rope, **options, backend=backend), *parts)
    want = with_gradients(lambda *x: rope_by_hand(*x, grid, rope, **options), *parts)
    for name, g, w in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        assert (g.double() - w.double()).abs().max() <= 2e-5 * max(w.abs().max(), 1), name


def test_what_counts_is_the_distance_of_frames():
    q, k, v = make(1, 8 * 3, 2, 16)
    near, far = (vk.divided_attention(q, k, v, vk.Grid(8, 1, 3), rope=(LINE, torch.arange(8) + at)) for at in (0, 9000))
    plain = vk.divided_attention(q, k, v, vk.Grid(8, 1, 3))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert (near - plain).abs().max() > 0.05
