"""Witness of attention: values worked by hand, an oracle that is not the reference, laws, and bad input.

Planted in the kernel and seen red here: edge slabs not compared, the key at an interval's end seen, sums not rescaled
to a new maximum, the sign of dlse in delta, states reset at the second chunk of keys.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkernels import Grid, MaskPlan, RopeSpec, VideoMask, attention
from vkernels.library import native, native_missing
from vkernels.masks import Box
from vkernels.ops.attention.torch_op import mask_arguments

NATIVE = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
BACKENDS = [pytest.param("cpu", marks=NATIVE), "reference"]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = [1, 7, 63, 64, 65, 127, 128, 129, 257]


def oracle(q, k, v, visible, scale):
    """One query at a time, in float64. visible(batch, query) lists its keys."""
    b, s_q, n, d = q.shape
    share = n // k.shape[2]
    rows, logs = [], []
    for batch in range(b):
        for i in range(s_q):
            keys = visible(batch, i)
            for head in range(n):
                ks, vs = k[batch, keys, head // share].double(), v[batch, keys, head // share].double()
                score = ks @ q[batch, i, head].double() * scale
                rows.append(torch.softmax(score, 0) @ vs if keys else vs.sum(0))
                logs.append(torch.logsumexp(score, 0) if keys else score.new_tensor(-math.inf))
    out = torch.stack(rows).reshape(b, s_q, n, d) if rows else q.double()
    lse = torch.stack(logs).reshape(b, s_q, n).transpose(1, 2) if logs else q.new_zeros(b, n, s_q).double()
    return out, lse


def pairs_of(plan):
    """Visible (query token -> key tokens) of one sample, pair by pair, from the words of the contract."""

    def rows(map_, stride, length, sample, group):
        return [
            int(map_[min(sample, len(map_) - 1)][i]) if map_ is not None else group * stride[0] + i * stride[1]
            for i in range(length)
        ]

    def pick(x, sample):
        return None if x is None else x[min(sample, len(x) - 1)].tolist()

    def visible(sample):
        ranges, box = pick(plan.ranges, sample), plan.box
        live_q = plan.len_q if plan.q_count is None else pick(plan.q_count, sample)
        live_k = plan.len_k if plan.k_count is None else pick(plan.k_count, sample)
        seen = {}
        for group in range(plan.groups):
            q_rows = rows(plan.q_rows, plan.q_stride, plan.len_q, sample, group)
            k_rows = rows(plan.k_rows, plan.k_stride, plan.len_k, sample, group)
            for i in range(plan.len_q):
                keys = []
                for j in range(live_k if i < live_q else 0):
                    ok = ranges is None or any(
                        ranges[i][2 * r] <= j < ranges[i][2 * r + 1] for r in range(len(ranges[i]) // 2)
                    )
                    if ok and box is not None:
                        q_attr, k_attr = pick(box.q_attr, sample), pick(box.k_attr, sample)
                        inside = all(lo <= k_attr[a][j] - q_attr[a][i] <= hi for a, (lo, hi) in enumerate(box.bounds))
                        q_global, k_global = pick(box.q_global, sample), pick(box.k_global, sample)
                        ok = inside or bool(q_global and q_global[i]) or bool(k_global and k_global[j])
                    if ok:
                        keys.append(k_rows[j])
                seen[q_rows[i]] = keys
        return seen

    samples = functools.cache(visible)
    return lambda sample, i: samples(sample)[i]


def check_against_oracle(plan, visible, b, n, m, d, s_q, s_k, backend, seed=0, scale=0.3, through_lse=True):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, s, heads, d, generator=generator, requires_grad=True)
        for s, heads in ((s_q, n), (s_k, m), (s_k, m))
    )
    want, want_lse = oracle(q, k, v, visible, scale)
    got, lse = attention(q, k, v, mask=plan, scale=scale, return_lse=True, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    if not got.numel():
        return
    dout = torch.randn(got.shape, generator=generator)
    dlse = torch.randn(lse.shape, generator=generator) * through_lse
    sees = torch.isfinite(want_lse)

    def project(out, log):
        return (out * dout).sum() + torch.where(sees, log, torch.zeros_like(log)).mul(dlse).sum()

    expected = torch.autograd.grad(project(want, want_lse), (q, k, v), allow_unused=True, materialize_grads=True)
    actual = torch.autograd.grad(project(got, lse), (q, k, v))
    for name, a, e in zip("qkv", actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=3e-5, msg=lambda text, name=name: f"d{name}: {text}")


@on_each_backend
def test_two_keys_worked_by_hand(backend):
    """Scores ln 3 and 0, so probabilities 3/4 and 1/4."""
    log3 = math.log(3.0)
    q = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2).requires_grad_()
    k = torch.tensor([[log3, 0.0], [0.0, 0.0]]).reshape(1, 2, 1, 2).requires_grad_()
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]]).reshape(1, 2, 1, 2).requires_grad_()
    out, lse = attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(4.0)]))
    dq, dk, dv = torch.autograd.grad(out[..., 0].sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(dq.flatten(), torch.tensor([0.75 * log3, 0.0]))
    torch.testing.assert_close(dk.flatten(), torch.tensor([0.75, 0.0, -0.75, 0.0]))
    torch.testing.assert_close(dv.flatten(), torch.tensor([0.75, 0.0, 0.25, 0.0]))
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(dq.flatten(), torch.tensor([0.75 * log3, 0.0]))
    torch.testing.assert_close(dk.flatten(), torch.tensor([0.75, 0.0, 0.25, 0.0]))
    torch.testing.assert_close(dv, torch.zeros_like(dv))


@on_each_backend
def test_frame_causal_worked_by_hand(backend):
    """Equal scores: every output is the mean over the frames seen so far."""
    v = torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0, 10.0]).reshape(1, 6, 1, 1)
    zero = torch.zeros(1, 6, 1, 1)
    out, lse = attention(zero, zero, v, mask=VideoMask.frame_causal(Grid(3, 1, 2)), return_lse=True, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.0, 3.0, 3.0, 5.0, 5.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([2.0, 2.0, 4.0, 4.0, 6.0, 6.0]).log())


@on_each_backend
def test_what_sees_nothing_is_zero_and_gets_nothing(backend):
    keep = torch.tensor([True, False, False, True, True, False])
    mask = VideoMask.frame_causal(Grid(3, 1, 2)).keep(keep, queries=True)
    q, k, v = (torch.randn(1, 6, 2, 8).requires_grad_() for _ in range(3))
    out, lse = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert torch.equal(out[0, ~keep], torch.zeros(3, 2, 8))
    assert torch.equal(lse[0][:, ~keep], torch.full((2, 3), -math.inf))
    for grad in torch.autograd.grad(out.sum() + lse[torch.isfinite(lse)].sum(), (q, k, v)):
        assert torch.equal(grad[0, ~keep], torch.zeros(3, 2, 8))
        assert torch.isfinite(grad).all()
        assert (grad[0, keep] != 0).any(-1).all()
    blind = MaskPlan(4, 6, 1, 4, 6, ranges=torch.tensor([[[0, 3], [2, 2], [6, 6], [5, 6]]], dtype=torch.int32))
    out, lse = attention(q[:, :4], k, v, mask=blind, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out[:, 1:3], torch.zeros(1, 2, 2, 8))
    assert (lse[:, :, 1:3] == -math.inf).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.equal(grads[1][:, 3:5], torch.zeros(1, 2, 2, 8))


@st.composite
def plans(draw):
    """Any plan the contract allows, small."""
    b = draw(st.integers(1, 2))
    p = draw(st.sampled_from([1, b]))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=seed, dtype=torch.int32)

    groups = draw(st.sampled_from([1, 1, 3]))
    len_q, len_k = draw(st.integers(1, 40)), draw(st.integers(0, 70))
    s_q, s_k = groups * len_q, groups * len_k
    strided = groups > 1 and draw(st.booleans())
    more = {}
    if groups > 1:
        more["q_stride"] = (1, groups) if strided and len_q > 1 else (len_q, 1)
        more["k_stride"] = (1, groups) if strided and len_k > 1 else (len_k, 1)
    live_k = len_k
    for side, length in (("q", len_q), ("k", len_k)):
        if groups == 1 and draw(st.booleans()):
            more[f"{side}_rows"] = torch.stack([torch.randperm(length, generator=seed) for _ in range(p)]).int()
            if draw(st.booleans()):
                count = integers(0, length + 1, p)
                more[f"{side}_count"] = count
                live_k = int(count.min()) if side == "k" else live_k
    if draw(st.booleans()):
        intervals = draw(st.integers(1, 3))
        more["ranges"] = integers(0, live_k + 1, p, len_q, 2 * intervals).sort(-1).values
    if draw(st.booleans()):
        relations = draw(st.integers(1, 3))
        flags = draw(st.tuples(st.booleans(), st.booleans()))
        more["box"] = Box(
            integers(0, 6, p, relations, len_q),
            integers(0, 6, p, relations, len_k),
            tuple((-draw(st.integers(0, 3)), draw(st.sampled_from([0, 2, 2**30]))) for _ in range(relations)),
            (integers(0, 8, p, len_q) == 0).to(torch.uint8) if flags[0] else None,
            (integers(0, 8, p, len_k) == 0).to(torch.uint8) if flags[1] else None,
        )
    return b, MaskPlan(s_q, s_k, groups, len_q, len_k, **more)


@on_each_backend
@given(drawn=plans(), heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), d=st.sampled_from([1, 8, 24]))
@settings(max_examples=40)
def test_any_plan_equals_the_oracle(backend, drawn, heads, d):
    b, plan = drawn
    check_against_oracle(plan, pairs_of(plan), b, *heads, d, plan.s_q, plan.s_k, backend)


@NATIVE
@pytest.mark.parametrize("s_k", LENGTHS)
def test_lengths_around_every_tile(s_k):
    for s_q in (1, 7, 65, 129):
        check_against_oracle(None, lambda b, i: list(range(s_k)), 1, 1, 1, 16, s_q, s_k, "cpu")


@NATIVE
@pytest.mark.parametrize("isa", native().isa_usable() if native() else [])
@pytest.mark.parametrize("d", [1, 13, 64, 72, 88, 256])
def test_every_instruction_set_and_head_size(isa, d):
    before = native().isa_active()
    native().isa_force(isa)
    try:
        ranges = torch.tensor([[[max(0, 3 * i - 20), 3 * i + 5] for i in range(33)]], dtype=torch.int32).clamp(max=90)
        plan = MaskPlan(33, 90, 1, 33, 90, ranges=ranges)
        check_against_oracle(plan, lambda b, i: list(range(*ranges[0, i])), 1, 2, 1, d, 33, 90, "cpu")
    finally:
        native().isa_force(before)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_keys_than_one_chunk(dtype):
    """Head size 256 and 1,700 keys: states and key gradients live through several chunks; one head, so tasks split."""
    q, k, v = (torch.randn(1, s, n, 256).to(dtype).requires_grad_() for s, n in ((450, 2), (1700, 1), (1700, 1)))
    end = torch.arange(450) * 4
    ranges = torch.stack([(end - 1300).clamp(min=0), (end - 900).clamp(min=0), (end - 30).clamp(min=0), end], -1)
    plan = MaskPlan(450, 1700, 1, 450, 1700, ranges=ranges[None].int().clamp(max=1700))
    out = attention(q, k, v, mask=plan, backend="cpu")
    key = torch.arange(1700)
    seen = ((key >= ranges[:, :1]) & (key < ranges[:, 1:2])) | ((key >= ranges[:, 2:3]) & (key < ranges[:, 3:]))
    score = torch.einsum("bqnd,bkmd->bnqk", q.double(), k.double()) / 16
    p = torch.softmax(score.masked_fill(~seen, -math.inf), -1).nan_to_num(0)
    want = torch.einsum("bnqk,bkmd->bqnd", p, v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    dout = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, (q, k, v), dout)
    score = score.masked_fill(~seen, -1e30)
    p = torch.softmax(score, -1) * seen
    expected = torch.autograd.grad(torch.einsum("bnqk,bkmd->bqnd", p, v.double()), (q, k, v), dout.double())
    for a, e in zip(got, expected, strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.double().flatten(), e.double().flatten(), 0)
        assert cosine > 1 - tolerance**2
        torch.testing.assert_close(a.double(), e.double(), rtol=10 * tolerance, atol=tolerance)


@on_each_backend
@given(cut=st.integers(1, 39), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_parts_merge_by_their_logarithms(backend, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, s, 2, 8, generator=generator) for s in (5, 40, 40))
    whole, _ = attention(q, k, v, return_lse=True, backend=backend)
    parts = [
        attention(q, k[:, part], v[:, part], return_lse=True, backend=backend)
        for part in (slice(0, cut), slice(cut, 40))
    ]
    weight = torch.softmax(torch.stack([lse for _, lse in parts]), 0).transpose(-1, -2)[..., None]
    merged = (torch.stack([out for out, _ in parts]) * weight).sum(0)
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)


@on_each_backend
@given(seed=st.integers(0, 99), size=st.sampled_from([8.0, 60.0]))
@settings(max_examples=10)
def test_order_of_keys_and_offset_of_scores_do_not_matter(backend, seed, size):
    """Scores of several hundred: only differences may reach the exponential."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, s, 1, 16, generator=generator) * x for s, x in ((9, size), (130, size), (130, 1.0)))
    order = torch.randperm(130, generator=generator)
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert torch.isfinite(out).all()
    again, lse_again = attention(q, k[:, order], v[:, order], return_lse=True, backend=backend)
    torch.testing.assert_close(again, out, rtol=1e-3, atol=1e-4)
    shifted, lse_shifted = attention(q, k + q[:, :1] * 0.01, v, return_lse=True, backend=backend)
    offset = (q[0, 0, 0] @ q[0, 0, 0] * 0.01 / 4).item()
    torch.testing.assert_close(shifted[:, 0], out[:, 0], rtol=1e-2, atol=2e-3)
    assert abs((lse_shifted - lse)[0, 0, 0].item() - offset) < 1e-3 * max(1.0, abs(lse[0, 0, 0].item()))
    torch.testing.assert_close(lse_again, lse, rtol=1e-5, atol=1e-4)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_from_run_to_run(dtype):
    q, k, v = (torch.randn(1, 512, 3, 64).to(dtype).requires_grad_() for _ in range(3))
    mask = VideoMask.frame_causal(Grid(8, 8, 8))
    runs = []
    for _ in range(5):
        out = attention(q, k, v, mask=mask, backend="cpu")
        runs.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@NATIVE
def test_offsets_beyond_two_to_the_31():
    """Two sequences 2^31 elements apart in a buffer that is touched only where they lie."""
    step = 2**31 + 64
    buffer = torch.empty(step + 5 * 2 * 8, dtype=torch.bfloat16)
    q = buffer.as_strided((2, 5, 2, 8), (step, 16, 8, 1))
    q.copy_(torch.randn(2, 5, 2, 8))
    compact = q.clone()
    got = attention(q, q, q, backend="cpu")
    assert torch.equal(got, attention(compact, compact, compact, backend="cpu"))


@NATIVE
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("layout", {0: [1, 4, 4, 0, 1]}, "layout must hold 7 numbers, got 5"),
        ("cover", {0: [2, 4, 4, 4, 1, 4, 1]}, "layout must cover every token row exactly once, got 8"),
        ("stride", {0: [1, 4, 4, 0, 2, 0, 1]}, "layout must cover every token row exactly once"),
        ("rows", {1: [[0, 1, 2, 4]]}, "q_rows must name every token row exactly once, got 4"),
        ("negative", {2: [[0, -1, 2, 3]]}, "k_rows must name every token row exactly once, got -1"),
        ("twice", {2: [[0, 1, 1, 3]]}, "k_rows must name every token row exactly once, got 1"),
        ("short", {1: [[0, 1, 2]]}, "q_rows must have size 4 in dimension 1"),
        ("count", {3: [2]}, "q_count must come with q_rows"),
        ("ranges", {5: [[[0, 4, 1]] * 4]}, "ranges must hold 1 to 3 intervals per query"),
        ("ranges rows", {5: [[[0, 4]] * 3]}, "ranges must have size 4 in dimension 1"),
        ("box", {6: [[[0] * 4]]}, "k_attr must be given with q_attr"),
        ("bounds", {6: [[[0] * 4]], 7: [[[0] * 4]], 8: [0]}, "bounds must hold a pair per attribute"),
        ("far", {6: [[[0] * 4]], 7: [[[0] * 4]], 8: [0, 2**31]}, "bounds must lie within 2"),
    ],
)
def test_native_code_refuses_what_it_could_not_survive(name, change, match):
    q = torch.randn(1, 4, 2, 8)
    arguments = list(mask_arguments(None, 4, 4))
    for index, value in change.items():
        arguments[index] = value if index in (0, 8) else torch.tensor(value, dtype=torch.int32)
    with pytest.raises(ValueError, match=match):
        torch.ops.vkernels.attention_fwd.cpu(q, q, q, 1.0, *arguments)


@NATIVE
def test_counts_and_ranges_out_of_bounds_are_clamped():
    q = torch.randn(1, 4, 2, 8)
    arguments = list(mask_arguments(None, 4, 4))
    arguments[1] = arguments[2] = torch.arange(4, dtype=torch.int32)[None]
    arguments[3] = arguments[4] = torch.tensor([2**31 - 1], dtype=torch.int32)
    arguments[5] = torch.tensor([[[-(2**31), 2**31 - 1]] * 4], dtype=torch.int32)
    out, _ = torch.ops.vkernels.attention_fwd.cpu(q, q, q, 1.0, *arguments)
    torch.testing.assert_close(out, attention(q, q, q, scale=1.0, backend="cpu"))


@on_each_backend
def test_temporal_logarithms_and_their_gradient_worked_by_hand(backend):
    """One patch, two frames, d = 1: keys 0 and ln 3. A query x has lse = log(1 + 3^x), whose slope is 3^x ln 3 /
    (1 + 3^x); a key's gradient is the sum over queries of probability times query."""
    q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).requires_grad_()
    k = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).requires_grad_()
    mask = VideoMask.temporal(Grid(2, 1, 1))
    _, lse = attention(q, k, torch.ones_like(k), mask=mask, scale=1.0, return_lse=True, backend=backend)
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(4), math.log(10)]), rtol=1e-6, atol=1e-6)
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    torch.testing.assert_close(dq.flatten(), math.log(3) * torch.tensor([0.75, 0.9]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dk.flatten(), torch.tensor([0.25 + 0.2, 0.75 + 1.8]), rtol=1e-5, atol=1e-6)


@on_each_backend
def test_temporal_logarithms_keep_their_patch(backend):
    """Every patch, sample and head has its own: against logsumexp of scores written out in float64."""
    t, patches, n, d = 9, 5, 3, 40
    q, k, v = (torch.randn(2, t * patches, n, d, requires_grad=True) for _ in range(3))
    mask = VideoMask.temporal(Grid(t, 1, patches))
    _, lse = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    a, b = (x.double().view(2, t, patches, n, d) for x in (q, k))
    want = torch.einsum("bilnd,bjlnd->bnilj", a, b).div(d**0.5).logsumexp(-1).flatten(2)
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    weight = torch.randn(lse.shape)
    got = torch.autograd.grad((lse * weight).sum(), (q, k))
    for g, w in zip(got, torch.autograd.grad((want * weight).sum(), (q, k)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@on_each_backend
def test_rope_is_rotation_by_hand_and_then_attention(backend):
    """One quarter turn per frame: (x0, x1) becomes (-x1, x0) at frame 1 and (-x0, -x1) at frame 2."""
    spec, pos = RopeSpec((math.pi / 2,)), torch.tensor([0, 1, 2])
    q, k, v = torch.randn(3, 1, 3, 2, 2).unbind()

    def turned(x):
        return torch.stack([x[:, 0], torch.stack([-x[:, 1, :, 1], x[:, 1, :, 0]], -1), -x[:, 2]], 1)

    got = attention(q, k, v, rope=(spec, pos), backend=backend)
    scores = torch.einsum("bqnd,bknd->bnqk", turned(q), turned(k)) / 2**0.5
    want = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - attention(q, k, v, backend=backend)).abs().max() > 1e-2


@NATIVE
@pytest.mark.parametrize("dropped", [False, True])
def test_a_narrow_mask_over_many_chunks_of_keys(dropped):
    """Frames that see themselves and the one before are calls of their own on two frames each; most strips see nothing
    of most chunks (up to 5 of them forward, 3 backward), some see nothing at all."""
    grid, n, d = Grid(72, 4, 8), 4, 256
    length, s = 32, grid.tokens
    mask, keep = VideoMask.frame_causal(grid, window=2), torch.ones(s, dtype=torch.bool)
    if dropped:
        keep[1000:1400] = False
        mask = mask.keep(keep, queries=True)
    q, k, v = (torch.randn(1, s, n, d, requires_grad=True) for _ in range(3))
    pull = torch.randn(1, s, n, d)

    def frame_by_frame():
        for t in range(grid.t):
            here, past = slice(t * length, (t + 1) * length), slice(max(t - 1, 0) * length, (t + 1) * length)
            score = torch.einsum("bqnd,bknd->bnqk", q[:, here], k[:, past]) / d**0.5
            weight = score.masked_fill(~keep[past], -1e30).softmax(-1) * (keep[here][:, None] & keep[past].any())
            yield torch.einsum("bnqk,bknd->bqnd", weight, v[:, past])

    got, want = attention(q, k, v, mask=mask, backend="cpu"), torch.cat(list(frame_by_frame()), 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for g, w in zip(*(torch.autograd.grad(x, (q, k, v), pull) for x in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
