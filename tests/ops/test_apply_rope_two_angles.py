"""apply_rope where each member of a neighbouring pair turns by an angle of its own, as V-JEPA2 was trained.

Planted and seen red here: members swapped, a member's sine taken from the other, the sign of a side, the scale left out
of the second member, a sample's table taken for all, the tail turned with the head; in the gradient the tables kept as
they were, or the sign.
"""

from __future__ import annotations

import math

import pytest
import torch

from vkernels import RopeSpec, apply_rope
from vkernels.library import triton_why_not

BACKENDS = ["cpu", "reference"]
if triton_why_not(torch.empty(0)) is None:
    BACKENDS.append("triton")  # interpreted
backends = pytest.mark.parametrize("backend", BACKENDS)


def tables(*angles):
    """Cosines and sines [1, 1, 2, 1] of the two members."""
    angle = torch.tensor(angles, dtype=torch.float64).view(1, 1, 2, 1)
    return angle.cos().float(), angle.sin().float()


@backends
def test_by_hand(backend):
    """The first member by a quarter turn, the second by none: (3, 4) becomes (-4, 4); the other way round (3, 3)."""
    spec, x = RopeSpec((0.0,), layout="pair"), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    for angles, want in (((math.pi / 2, 0.0), [-4.0, 4.0]), ((0.0, math.pi / 2), [3.0, 3.0])):
        y = apply_rope(x, None, spec, angle=tables(*angles), backend=backend)
        assert y.flatten().tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, where Triton is interpreted
@backends
@pytest.mark.parametrize(("d", "rotary", "offset"), [(64, 60, 0), (64, 64, 0), (40, 12, 6), (23, 20, 0), (9, 4, 3)])
@pytest.mark.parametrize("samples", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_each_member_is_that_of_its_own_rotation(backend, d, rotary, offset, samples):
    """The first members of one rotation, the second members of another, and what does not turn beside infinity."""
    torch.manual_seed(d)
    spec = RopeSpec((0.0,) * (rotary // 2), layout="pair", offset=offset, scale=1.5)
    q, k = torch.randn(2, 5, 3, d), torch.randn(2, 5, 1, d)
    if offset + rotary < d:
        q[0, 0, 0, -1] = math.inf
    cos, sin = (torch.randn(n, 5, 2, rotary // 2) for n in samples)
    got = apply_rope(q, k, spec, angle=(cos, sin), backend=backend)
    member = [apply_rope(q, k, spec, angle=(cos[:, :, i], sin[:, :, i]), backend="reference") for i in (0, 1)]
    for y, first, second in zip(got, *member, strict=True):
        want = first.clone()
        second_members = slice(offset + 1, offset + rotary, 2)
        want[..., second_members] = second[..., second_members]
        torch.testing.assert_close(y, want, rtol=1e-6, atol=2e-6)
    in_place = q.clone()
    apply_rope(in_place, None, spec, angle=(cos, sin), inplace=True, backend=backend)
    assert torch.equal(in_place, got[0])


@backends
def test_the_gradient_is_the_transposed_matrix(backend):
    """No rotation, so not the inverse: against the matrix itself, column by column."""
    spec, d = RopeSpec((0.0,) * 3, layout="pair", offset=1, scale=0.5), 8
    cos, sin = torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 3)
    basis = torch.eye(d).view(1, 1, d, d)
    matrix = apply_rope(basis, None, spec, angle=(cos, sin), backend="reference")[0, 0].T  # y = matrix x
    x, g = torch.randn(1, 1, 1, d, requires_grad=True), torch.randn(d)
    y = apply_rope(x, None, spec, angle=(cos, sin), backend=backend)
    (dx,) = torch.autograd.grad(y, x, g.view_as(y))
    torch.testing.assert_close(dx.flatten(), matrix.T @ g, rtol=1e-6, atol=1e-6)


_GOOD = (1, 2, 2, 4)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize(
    ("cos", "sin", "layout"),
    [
        pytest.param((1, 2, 3, 4), (1, 2, 3, 4), [0, 0], id="three members"),
        pytest.param(_GOOD, _GOOD, [1, 0], id="halves"),
        pytest.param(_GOOD, (1, 2, 4), [0, 0], id="sines of pairs"),
        pytest.param((1, 2, 2, 5), (1, 2, 2, 5), [0, 0], id="beyond the head"),
        pytest.param(_GOOD, (3, 2, 2, 4), [0, 0], id="another batch"),
        pytest.param((1, 3, 2, 4), (1, 3, 2, 4), [0, 0], id="another length"),
    ],
)
def test_direct_calls_are_refused_what_they_cannot_mean(backend, cos, sin, layout):
    call, q = getattr(torch.ops.vkernels.apply_rope, backend), torch.randn(1, 2, 1, 8)
    with pytest.raises((RuntimeError, ValueError), match="apply_rope: "):
        call(q, None, None, None, None, torch.randn(cos), torch.randn(sin), 1.0, False, layout)


def test_cuda_says_why_not():
    with pytest.raises(RuntimeError, match="each member of a pair has an angle of its own"):
        apply_rope(
            torch.randn(1, 1, 1, 2), None, RopeSpec((0.0,), layout="pair"), angle=tables(0.0, 1.0), backend="cuda"
        )
