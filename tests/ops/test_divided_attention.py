"""The witness of divided_attention: nothing here calls its reference.

Seen red: keys of the last score block left unmasked (baseline instruction set, temporal with 5 frames); the CLS mean
divided by t + 1; the last key of a group dropped; rows of a group one token apart; dV only from the first block of
queries. With test_attention.py, for the same kernel: lse of the pair's other query; grad_lse with its sign flipped.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vkernels as vk
from vkernels.library import native_missing

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(native_missing() is not None, reason="no native library")),
    "reference",
]
backends = pytest.mark.parametrize("backend", BACKENDS)


def attend(q, k, v, scale=None):
    """Plain attention over s n d, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1)


def by_hand(q, k, v, t, patches, axis, cls, order, frames):
    """Group by group, token by token: lists of token rows, no rearrangement."""

    def row(frame, patch):
        return cls + (frame * patches + patch if order == "frame" else patch * t + frame)

    groups = t // frames
    if axis == "temporal":
        rows = [[row(g * frames + i, p) for i in range(frames)] for g in range(groups) for p in range(patches)]
    else:
        rows = [[row(j + i * groups, p) for i in range(frames) for p in range(patches)] for j in range(groups)]
    o = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for group in rows:
            seen = ([0] if cls and axis == "spatial" else []) + group
            out = attend(q[b, seen], k[b, seen], v[b, seen])
            o[b, group] = out[-len(group) :]
            if cls and axis == "spatial":
                o[b, 0] += out[0] / groups
    return o


def make(b, s, n, d, m=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, s, heads, d, generator=generator) for heads in (n, m or n, m or n)]


@backends
def test_two_frames_worked_by_hand(backend):
    # One patch, d = 1, scale 1. Frame 0 has k = 0, frame 1 has k = ln 3: a query of 1 weighs them 1/4 and 3/4.
    k = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    v = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    q = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    o = vk.divided_attention(q, k, v, vk.Grid(2, 1, 1), scale=1.0, backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([7.0, 6.0]))


@backends
def test_shared_cls_worked_by_hand(backend):
    # CLS has k = 0, v = 0; the two frames have k = ln 3, v = 4 and k = 0, v = 8. A CLS query of 1 sees 3/4 * 4 = 3 in
    # the first frame and 1/2 * 8 = 4 in the second: mean 3.5. One softmax over all three would give 20 / 5 = 4.
    k = torch.tensor([0.0, math.log(3), 0.0]).view(1, 3, 1, 1)
    v = torch.tensor([0.0, 4.0, 8.0]).view(1, 3, 1, 1)
    q = torch.ones(1, 3, 1, 1)
    o = vk.divided_attention(q, k, v, vk.Grid(2, 1, 1), axis="spatial", cls=1, scale=1.0, backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([3.5, 3.0, 4.0]))


@backends
def test_cls_is_the_mean_of_separate_softmaxes_and_not_one_softmax(backend):
    t, patches = 4, 6
    q, k, v = make(2, 1 + t * patches, 3, 16)
    o = vk.divided_attention(q, k, v, vk.Grid(t, 2, 3), axis="spatial", cls=1, backend=backend)
    want = by_hand(q, k, v, t, patches, "spatial", 1, "frame", 1)
    joint = torch.stack([attend(q[b, :1], k[b], v[b]) for b in range(2)])
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)
    assert (o[:, :1] - joint).abs().max() > 0.05


@backends
def test_temporal_bypasses_the_cls(backend):
    q, k, v = (x.requires_grad_() for x in make(1, 1 + 6, 2, 8))
    o = vk.divided_attention(q, k, v, vk.Grid(3, 1, 2), cls=1, backend=backend)
    assert torch.equal(o[:, 0], torch.zeros(1, 2, 8))
    for grad in torch.autograd.grad(o.square().sum(), (q, k, v)):
        assert torch.equal(grad[:, 0], torch.zeros(1, 2, 8))
        assert (grad[:, 1:] != 0).any()


@backends
def test_chat_model_groups(backend):
    """64 tokens in time with layers told 32: two half clips in the T-layer, frames f and f + 32 in the S-layer."""
    q, k, v = make(1, 1 + 64, 1, 8)
    grid = vk.Grid(64, 1, 1)
    o = vk.divided_attention(q, k, v, grid, cls=1, order="patch", frames_per_group=32, backend=backend)
    for half in (slice(1, 33), slice(33, 65)):
        torch.testing.assert_close(
            o[0, half].double(), attend(q[0, half], k[0, half], v[0, half]), rtol=1e-5, atol=1e-5
        )
    o = vk.divided_attention(q, k, v, grid, axis="spatial", cls=1, order="patch", frames_per_group=2, backend=backend)
    rows = [0, 1 + 5, 1 + 5 + 32]
    torch.testing.assert_close(
        o[0, rows[1:]].double(), attend(q[0, rows], k[0, rows], v[0, rows])[1:], rtol=1e-5, atol=1e-5
    )


CALLS = st.fixed_dictionaries(
    {
        "b": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "frames": st.sampled_from([1, 2, 7, 8, 9, 16, 33]),
        "patches": st.integers(1, 5),
        "m": st.integers(1, 3),
        "per_key": st.integers(1, 3),
        "d": st.sampled_from([8, 24, 64, 72, 88, 136]),
        "axis": st.sampled_from(["temporal", "spatial"]),
        "cls": st.integers(0, 1),
        "order": st.sampled_from(["frame", "patch"]),
    }
)


@pytest.mark.skipif(native_missing() is not None, reason="no native library")
@settings(max_examples=60, deadline=None)
@given(CALLS)
def test_kernel_equals_groups_taken_by_hand(c):
    t, frames = c["groups"] * c["frames"], c["frames"]
    s = c["cls"] + t * c["patches"]
    packed = make(c["b"], s, c["m"] * (c["per_key"] + 2), c["d"])[0]  # q, k, v are slices of one row
    q, k, v = packed.split([c["m"] * c["per_key"], c["m"], c["m"]], dim=2)
    grid = vk.Grid(t, 1, c["patches"])
    options = {"axis": c["axis"], "cls": c["cls"], "order": c["order"], "frames_per_group": frames}
    want = by_hand(q, k, v, t, c["patches"], c["axis"], c["cls"], c["order"], frames)
    o = vk.divided_attention(q, k, v, grid, **options, backend="cpu")
    torch.testing.assert_close(o.double(), want, rtol=1e-4, atol=1e-5)
    half = [x.bfloat16() for x in (q, k, v)]
    o = vk.divided_attention(*half, grid, **options, backend="cpu")
    want = by_hand(*half, t, c["patches"], c["axis"], c["cls"], c["order"], frames)
    torch.testing.assert_close(o.double(), want, rtol=2e-2, atol=2e-2)


@backends
@pytest.mark.parametrize(("axis", "t", "patches"), [("temporal", 70, 2), ("spatial", 2, 70)])
def test_gradients_equal_groups_taken_by_hand(backend, axis, t, patches):
    """70 tokens to a group: more than one block of queries adds to every key."""
    leaves = [x.requires_grad_() for x in make(1, 1 + t * patches, 2, 24, m=1)]
    o = vk.divided_attention(*leaves, vk.Grid(t, 1, patches), axis=axis, cls=1, backend=backend)
    want = by_hand(*leaves, t, patches, axis, 1, "frame", t if axis == "temporal" else 1)
    weight = make(1, 1 + t * patches, 2, 24, seed=1)[0]
    got = torch.autograd.grad((o * weight).sum(), leaves)
    for g, w in zip(got, torch.autograd.grad((want * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@backends
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_orders_agree_under_permutation(backend, axis):
    t, patches = 5, 4
    q, k, v = make(2, 1 + t * patches, 2, 32)
    to_patch = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(t * patches).view(t, patches).T.flatten()])
    grid = vk.Grid(t, 2, 2)
    frame = vk.divided_attention(q, k, v, grid, axis=axis, cls=1, backend=backend)
    patch = vk.divided_attention(
        *(x[:, to_patch] for x in (q, k, v)), grid, axis=axis, cls=1, order="patch", backend=backend
    )
    torch.testing.assert_close(frame[:, to_patch], patch, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(native_missing() is not None, reason="no native library")
@pytest.mark.parametrize("axis", ["temporal", "spatial"])
def test_runs_are_bit_equal(axis):
    q, k, v = (x.requires_grad_() for x in make(2, 1 + 8 * 9, 4, 64))

    def once():
        o = vk.divided_attention(q, k, v, vk.Grid(8, 3, 3), axis=axis, cls=1, backend="cpu")
        return [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.skipif(native_missing() is not None, reason="no native library")
def test_native_code_refuses_what_python_would_have():
    q, k, v = make(1, 4, 2, 8)
    run = torch.ops.vkernels.divided_attention_fwd.cpu
    with pytest.raises(ValueError, match="q must have one token per patch"):
        run(q, k, v, 1.0, [3, 2, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="frames_per_group must divide the frames"):
        run(q, k, v, 1.0, [4, 1, 0, 0, 0, 3])
    with pytest.raises(ValueError, match="k must have size 8 in dimension 3"):
        run(q, k[..., :4], v, 1.0, [4, 1, 0, 0, 0, 4])
