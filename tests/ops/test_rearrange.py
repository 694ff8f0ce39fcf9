"""Witness of rearrange and its plans: small arrays written out, einops, torch's own pooling and indexing, laws.

Planted and seen red here: a tap weight dropped, the last tap of a row skipped, the batch stride of a plan per sample
ignored, fill rows numbered one too low, the mean left in RMSNorm, the tail of a row not written, the transposed
weights not sorted with their taps, window padding kept, `-1` read as the last row, a gate's gradient without the scale,
the edge of an affine tile, the native check of row numbers, the order of interleaved clips.
"""

from __future__ import annotations

import einops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vkernels as vk
from vkernels import rearrangement as plans
from vkernels.library import native, native_missing, triton_why_not

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(native_missing()), reason="no native"))]
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(triton_why_not(torch.zeros(1)) is not None, reason="no Triton")
)
both = pytest.mark.parametrize("backend", BACKENDS)
all_three = pytest.mark.parametrize("backend", [*BACKENDS, TRITON])  # the interpreter is slow: where the case is small


def numbers(*shape):
    """Row r of a token tensor holds r in every channel."""
    return torch.arange(shape[-1]).float()[None, :, None].expand(1, -1, 3).contiguous()


def order(plan, n):
    """Which row each output row is, by moving the row numbers themselves."""
    return vk.rearrange(numbers(n), plan)[..., 0].flatten().int().tolist()


# ---- builders, by hand ---------------------------------------------------------------------------------------------


def test_temporal_and_spatial_by_hand():
    assert order(plans.temporal(2, 3), 6) == [0, 3, 1, 4, 2, 5]
    assert order(plans.temporal(2, 3, cls=1), 7) == [1, 4, 2, 5, 3, 6]
    assert order(plans.temporal(2, 3, layout="l t"), 6) == [0, 1, 2, 3, 4, 5]
    assert order(plans.spatial(2, 3, layout="l t"), 6) == [0, 2, 4, 1, 3, 5]
    assert order(plans.spatial(2, 2, cls="replicate"), 5) == [0, 1, 2, 0, 3, 4]
    assert vk.rearrange(torch.zeros(4, 7, 5), plans.temporal(2, 3, cls=1)).shape == (12, 2, 5)
    assert vk.rearrange(torch.zeros(4, 7, 5), plans.spatial(2, 3, cls="replicate")).shape == (8, 4, 5)


def test_the_way_back_takes_cls_from_the_second_source_or_as_a_mean():
    x = torch.arange(12.0).view(6, 2, 1)  # 3 patches x 2 frames of 2 samples, as temporal leaves them
    cls = torch.tensor([[[100.0]], [[200.0]]])
    got = vk.rearrange([x, cls], plans.temporal_back(2, 3, cls=1))[..., 0]
    assert got.tolist() == [[100, 0, 2, 4, 1, 3, 5], [200, 6, 8, 10, 7, 9, 11]]
    frames = torch.tensor([[10.0, 1, 2], [20.0, 3, 4]])[..., None]  # b*t=2, cls first
    assert vk.rearrange(frames, plans.spatial_back(2, 2, cls="mean"))[0, :, 0].tolist() == [15, 1, 2, 3, 4]


def test_interleave_is_the_formula():
    m, n, k = 3, 2, 2
    v = torch.randn(1, m, n, k, 5)
    z = vk.rearrange(v, plans.interleave_clips(m, n, k))[0]
    for j in range(m):
        for i in range(n):
            for p in range(k):
                assert torch.equal(z[(i * m + j) * k + p], v[0, j, i, p])
    assert torch.equal(vk.rearrange(v.view(m, n * k, 5), plans.interleave_clips(m, n, k))[0], z)


def test_four_frames_deal_to_13_and_24_and_odd_counts_repeat_the_last():
    assert order(plans.deal_clips(2, 2, 1), 4) == [0, 2, 1, 3]
    assert order(plans.deal_clips(2, 2, 1, frames=3), 3) == [0, 2, 1, 2]
    x = torch.randn(2, 5 * 4, 3)
    dealt = vk.rearrange(x, plans.deal_clips(3, 2, 4, frames=5))
    assert dealt.shape == (6, 8, 3)
    assert torch.equal(vk.rearrange(dealt, plans.interleave_clips(3, 2, 4, frames=5)), x)


def test_window_drops_the_padding():
    plan = plans.window(1, 3, 3, 2)
    assert order(plan, 9) == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert plan.cu_seqlens.tolist() == [0, 4, 6, 8, 9]
    assert order(plan.inverse, 9) == [0, 1, 4, 2, 3, 5, 6, 7, 8]
    assert order(plans.window(1, 1, 3, 2, unit=2), 6) == [0, 1, 2, 3, 4, 5]
    assert plans.window(1, 1, 3, 2, unit=2).cu_seqlens.tolist() == [0, 4, 6]


def test_merge_order_crop_and_newlines_by_hand():
    assert order(plans.merge_order(1, 2, 4), 8) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order(plans.crop(3, 3, top=1, left=1, height=2, width=1), 9) == [4, 7]
    x, nl = numbers(4), torch.full((1, 3), -1.0)
    for mode, want in (
        ("grid", [0, 1, -1, 2, 3, -1]),
        ("frame", [0, 1, 2, 3, -1]),
        ("one_token", [0, 1, 2, 3, -1]),
    ):
        got = vk.rearrange(x, plans.newline(1, 2, 2, mode=mode), fill=nl)
        assert got[0, :, 0].tolist() == want
    assert order(plans.newline(2, 1, 2, mode="none"), 4) == [0, 1, 2, 3]


def test_tiles_and_frames():
    x = torch.arange(8.0).view(1, 8, 1)  # 1 x 2 tiles of 2 x 2
    assert vk.rearrange(x, plans.tiles_to_canvas(1, 2, 2, 2)).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    y = torch.randn(6, 5, 4)
    assert torch.equal(vk.rearrange(y, plans.frames(3)), y.view(2, 15, 4))
    assert torch.equal(vk.rearrange(y.view(2, 15, 4), plans.frames(3).inverse), y)


def test_st_llm_frames():
    """The vectors of the released code."""
    for t, r, want in (
        (64, 16, list(range(2, 64, 4))),
        (100, 16, [3, 9, 15, 22, 28, 34, 41, 47, 53, 59, 65, 72, 78, 84, 91, 97]),
        (20, 16, [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15, 16, 18, 19]),
        (16, 4, [2, 6, 10, 14]),
    ):
        assert order(plans.local_frames(t, r, 1), t) == want


@all_three
def test_global_local_adds_the_mean_frame(backend):
    x = torch.randn(2, 8 * 3, 5)
    g = vk.rearrange(x, plans.frame_mean(8, 3), backend=backend)
    frames = x.view(2, 8, 3, 5)
    torch.testing.assert_close(g, frames.mean(1))
    got = vk.rearrange([x, g], plans.global_local(8, 4, 3), backend=backend)
    torch.testing.assert_close(got.view(2, 4, 3, 5), frames[:, [1, 3, 5, 7]] + g[:, None])


@both
@pytest.mark.parametrize(("h", "w", "stride"), [(27, 27, 2), (4, 6, 2), (5, 7, 3)])
def test_pools_are_torchs(backend, h, w, stride):
    x = torch.randn(1, 2 * h * w, 20)
    image = x.view(2, h, w, 20).permute(0, 3, 1, 2)

    def run(mode, **more):
        y = vk.rearrange(x, plans.pool(2, h, w, mode=mode, stride=stride, **more), backend=backend)
        return y.view(2, -1, 20)

    def tokens(y):
        return y.permute(0, 2, 3, 1).flatten(1, 2)

    torch.testing.assert_close(run("mean"), tokens(F.avg_pool2d(image, stride)))
    torch.testing.assert_close(run("max"), tokens(F.max_pool2d(image, stride)), rtol=0, atol=0)
    torch.testing.assert_close(run("max", ceil=True), tokens(F.max_pool2d(image, stride, ceil_mode=True)))
    torch.testing.assert_close(run("mean", ceil=True), tokens(F.avg_pool2d(image, stride, ceil_mode=True)))
    size = (-(-h // stride), -(-w // stride))
    torch.testing.assert_close(run("bilinear"), tokens(F.interpolate(image, size=size, mode="bilinear")))


@both
def test_adaptive_pool_and_position_tables_are_torchs(backend):
    x = torch.randn(1, 5 * 6 * 7, 9)
    want = F.adaptive_avg_pool3d(x.view(1, 5, 6, 7, 9).permute(0, 4, 1, 2, 3), (2, 4, 3))
    got = vk.rearrange(x, plans.adaptive_pool(5, 6, 7, out=(2, 4, 3)), backend=backend)
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2))
    table = torch.randn(1, 16, 9)
    image = table.view(1, 4, 4, 9).permute(0, 3, 1, 2)
    for mode in ("bilinear", "bicubic"):
        for corners in (False, True):
            want = F.interpolate(image, size=(6, 10), mode=mode, align_corners=corners)
            plan = plans.pos_embed((4, 4), (6, 10), mode=mode, align_corners=corners)
            got = vk.rearrange(table, plan, backend=backend)
            torch.testing.assert_close(got, want.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    blocks = vk.rearrange(table, plans.pos_embed((4, 4), (6, 10), merge=2, t=2), backend=backend)
    plain = vk.rearrange(table, plans.pos_embed((4, 4), (6, 10)), backend=backend)
    torch.testing.assert_close(blocks, vk.rearrange(plain, plans.merge_order(1, 6, 10)).repeat(1, 2, 1))


def test_pixel_unshuffle_is_torchs_and_einops():
    x = torch.randn(2, 4 * 6, 5)
    got = vk.rearrange(x, plans.pixel_unshuffle(4, 6, 2))
    assert torch.equal(got, einops.rearrange(x, "b (h p w q) c -> b (h w) (p q c)", h=2, p=2, w=3, q=2))
    assert torch.equal(vk.rearrange(got, plans.pixel_shuffle(2, 3, 2)), x)
    first = vk.rearrange(x, plans.pixel_unshuffle(4, 6, 2, channels="first"))
    want = F.pixel_unshuffle(x.view(2, 4, 6, 5).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    assert torch.equal(first, want)


def test_keep_by_mask_indices_and_count():
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    x = torch.randn(2, 4, 6)
    want = x[mask].view(2, 2, 6)
    assert torch.equal(vk.rearrange(x, plans.keep(mask)), want)
    assert torch.equal(vk.rearrange(x, plans.keep(mask, count=2)), want)
    three = vk.rearrange(x, plans.keep(mask, count=3))
    assert torch.equal(three[:, :2], want)
    assert not three[:, 2].any()
    assert torch.equal(vk.rearrange(x, plans.keep(indices=torch.tensor([[0, 2], [1, 2]]), n=4)), want)
    back = vk.rearrange(want, plans.keep(mask).inverse)
    assert torch.equal(back, x * mask[..., None])


def test_unpad_and_pad():
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    x = torch.randn(3, 3, 4)
    plan = plans.unpad(mask)
    packed = vk.rearrange(x, plan)
    assert torch.equal(packed, x[mask])
    assert plan.cu_seqlens.tolist() == [0, 2, 3, 3]
    padded = x * mask[..., None]
    assert torch.equal(vk.rearrange(packed, plans.pad(plan.cu_seqlens, 3)), padded)
    assert torch.equal(vk.rearrange(packed, plan.inverse), padded)


@all_three
def test_clusters_and_tome(backend):
    x = torch.tensor([[[1.0], [2], [4], [8]], [[1.0], [2], [4], [8]]])
    labels = torch.tensor([[0, 2, 0, -1], [2, 2, 2, 1]])
    got = vk.rearrange(x, plans.clusters(labels, 3), backend=backend)[..., 0]
    torch.testing.assert_close(got, torch.tensor([[2.5, 0, 2], [0, 8, 7 / 3]]))
    # Even tokens 0, 2, 4; odd 1, 3. Token 2 equals token 3: that pair merges first.
    metric = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1], [0, 1], [-1, 0]]])
    plan, size = plans.tome(metric, 1)
    tokens = torch.tensor([[[0.0], [10], [20], [40], [80]]])
    assert vk.rearrange(tokens, plan, backend=backend).flatten().tolist() == [0, 80, 10, 30]
    assert size.tolist() == [[1, 1, 1, 2]]
    again, _ = plans.tome(metric, 1, size=torch.tensor([[1.0, 1, 3, 1, 1]]))
    assert vk.rearrange(tokens, again, backend=backend).flatten().tolist() == [0, 80, 10, 25]


@all_three
def test_assemble_splices_pools_and_carries_labels(backend):
    video = plans.pool(1, 2, 4, stride=2).compose(plans.newline(1, 1, 2))
    plan = plans.assemble([("text", 2), ("video", 3), ("text", 1)], video=video)
    text, frames = torch.randn(2, 3, 5), torch.randn(2, 8, 5)
    nl = torch.randn(1, 5)
    got = vk.rearrange([text, frames], plan, fill=nl, backend=backend)
    grid = frames.view(2, 2, 2, 2, 5).mean((1, 3))
    torch.testing.assert_close(got, torch.cat([text[:, :2], grid, nl.expand(2, 1, 5), text[:, 2:]], 1))
    assert plan.apply_index(torch.tensor([7, 8, 9]), fill=-100).tolist() == [7, 8, -100, -100, -100, 9]

    mask = torch.tensor([[False, True, True, False], [True, True, False, False]])
    embeds, rows = torch.randn(2, 4, 5), torch.randn(2, 2, 5)
    want = embeds.masked_scatter(mask[..., None], rows)
    assert torch.equal(vk.rearrange([embeds, rows], plans.assemble(mask), backend=backend), want)
    out = embeds.clone()
    assert vk.rearrange(rows, plans.keep(indices=torch.arange(2), n=2), out=out, rows=plans.rows_of(mask, 2)) is out
    assert torch.equal(out, want)

    packed = plans.pack([[("text", 1), ("video", 2)], [("video", 1), ("text", 1)]])
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    got = vk.rearrange([numbers(2)[0], numbers(3)[0] + 10], packed)[:, 0]
    assert got.tolist() == [0, 10, 11, 12, 1]


def test_pair_mean():
    assert vk.rearrange(numbers(8), plans.pair_mean(4, 2))[0, :, 0].tolist() == [1, 2, 5, 6]


# ---- einops as the oracle ------------------------------------------------------------------------------------------

PATTERNS = [
    ("b t (h w) c -> (b h w) t c", (2, 3, 12, 5), {"h": 3}),
    ("(b t) n c -> b (t n) c", (6, 4, 5), {"t": 3}),
    ("b (l t) c -> (b t) l c", (2, 12, 5), {"t": 3}),
    ("b s (k n d) -> k b n s d", (2, 7, 24), {"k": 3, "n": 2}),
    ("b s c -> c s b", (3, 37, 70), {}),
    ("b c h w -> b (h w) c", (2, 67, 5, 9), {}),
    ("b 1 s -> s b 1", (2, 1, 5), {}),
]


@both
@pytest.mark.parametrize(("pattern", "shape", "sizes"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_patterns_are_einops(backend, pattern, shape, sizes, dtype):
    x = torch.randint(0, 200, shape).to(dtype)
    plan = plans.from_einops(pattern, **sizes)
    got = vk.rearrange(x, plan, backend=backend)
    assert torch.equal(got, einops.rearrange(x, pattern, **sizes))
    assert torch.equal(vk.rearrange(got, plans.from_einops(pattern, shape, **sizes).inverse, backend=backend), x)


@both
@given(data=st.data())
def test_any_permutation_and_grouping_is_einops(backend, data):
    names = list("abcde")[: data.draw(st.integers(1, 5))]
    sizes = {n: data.draw(st.integers(1, 5), n) for n in names}

    def side():
        left, words = list(data.draw(st.permutations(names))), []
        while left:
            k = data.draw(st.integers(1, len(left)))
            words.append(left[0] if k == 1 else "(" + " ".join(left[:k]) + ")")
            left = left[k:]
        return " ".join(words)

    a, b = side(), side()
    flat = torch.randn([sizes[n] for n in names])
    x = einops.rearrange(flat, f"{' '.join(names)} -> {a}")
    got = vk.rearrange(x, plans.from_einops(f"{a} -> {b}", **sizes), backend=backend)
    assert torch.equal(got, einops.rearrange(x, f"{a} -> {b}", **sizes))


def test_repeat_is_einops_with_its_gradient():
    x = torch.randn(2, 3, requires_grad=True)
    plan = plans.from_einops("b c -> b (c r) k", r=2, k=3)
    y = vk.rearrange(x, plan)
    assert torch.equal(y, einops.repeat(x, "b c -> b (c r) k", r=2, k=3))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 6.0))


# ---- laws ----------------------------------------------------------------------------------------------------------


@st.composite
def sparse_plans(draw, n_in=None):
    n_in = n_in if n_in is not None else draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.integers(0, n_in - 1), max_size=4), max_size=8))
    ptr, idx = [0], []
    for row in rows:
        idx += row
        ptr.append(len(idx))
    weight = [draw(st.sampled_from([0.5, 1.0, -2.0, 0.25])) for _ in idx]
    return plans.csr("drawn", ptr, idx, weight if draw(st.booleans()) else None, (n_in,))


def dense(plan):
    """The plan as a matrix, written by loops."""
    matrix = torch.zeros(plan.n_out, plan.n_in)
    for r in range(plan.n_out):
        for k in range(int(plan.ptr[0, r]), int(plan.ptr[0, r + 1])):
            matrix[r, int(plan.idx[0, k])] += 1.0 if plan.weight is None else float(plan.weight[0, k])
    return matrix


@both
@given(plan=sparse_plans(), c=st.integers(1, 70), b=st.integers(1, 2))
def test_a_plan_is_its_matrix_and_its_gradient_the_transpose(backend, plan, c, b):
    x = torch.randn(b, plan.n_in, c, requires_grad=True)
    y = vk.rearrange(x, plan, backend=backend)
    matrix = dense(plan)
    torch.testing.assert_close(y, matrix @ x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, matrix.T @ dy)
    torch.testing.assert_close(vk.rearrange(dy, plan.transpose, backend=backend), matrix.T @ dy)
    assert plan.transpose.transpose == plan.transpose.transpose


@given(data=st.data())
def test_composition_is_the_product_and_associative(data):
    p = data.draw(sparse_plans())
    q = data.draw(sparse_plans(n_in=p.n_out)) if p.n_out else p
    if not p.n_out:
        return
    torch.testing.assert_close(dense(p.compose(q)), dense(q) @ dense(p))
    if q.n_out:
        r = data.draw(sparse_plans(n_in=q.n_out))
        torch.testing.assert_close(dense(p.compose(q).compose(r)), dense(p.compose(q.compose(r))))


@all_three
def test_plans_per_sample_with_duplicates_and_empty_rows(backend):
    x = torch.randn(2, 4, 33, requires_grad=True)
    plan = plans.gather("mine", torch.tensor([[3, 3, -1], [0, 1, 3]]), (4,))
    y = vk.rearrange(x, plan, backend=backend)
    assert torch.equal(y[0], torch.stack([x[0, 3], x[0, 3], torch.zeros(33)]))
    assert torch.equal(y[1], x[1, [0, 1, 3]])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[..., 0].tolist() == [[0, 0, 0, 2], [1, 1, 0, 1]]
    composed = plan.compose(plans.keep(indices=torch.tensor([2, 0]), n=3))
    assert torch.equal(vk.rearrange(x, composed, backend=backend), y[:, [2, 0]])
    with pytest.raises(ValueError, match=r"inverse: plan must read no row twice"):
        _ = plan.inverse


@all_three
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8])
def test_integers_follow_the_tokens(backend, dtype):
    values = torch.tensor([[0, 1, 0, 1, 1, 0]]).to(dtype)
    plan = plans.keep(indices=torch.tensor([4, 0, 5]), n=6)
    assert plan.apply_index(values, fill=0).tolist() == values[:, [4, 0, 5]].tolist()
    assert torch.equal(vk.rearrange(values[..., None], plan, backend=backend), values[:, [4, 0, 5], None])
    positions = torch.arange(18).view(3, 6)
    assert torch.equal(plan.apply_index(positions), positions[:, [4, 0, 5]])


@all_three
def test_moves_keep_every_bit(backend):
    bits = torch.tensor([0x7FC01234, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    x = bits.view(torch.float32).view(1, 4, 1)  # a NaN with a payload, -0, a subnormal, infinity
    got = vk.rearrange(x, plans.keep(indices=torch.tensor([3, 2, 1, 0]), n=4), backend=backend)
    assert torch.equal(got.view(torch.int32).flatten(), bits.flip(0))


# ---- the epilogue --------------------------------------------------------------------------------------------------


@all_three
def test_epilogue_order_by_hand(backend):
    """u = residual + scale * gate * (v + bias); LayerNorm of (1, 3) is (-1, 1)."""
    x = torch.tensor([[[9.0, 9], [1, 2]]])
    plan = plans.keep(indices=torch.tensor([1]), n=2)
    y, u = vk.rearrange(
        x, plan, bias=torch.tensor([1.0, 0]), scale=0.5, gate=torch.tensor([2.0, 4]),
        residual=torch.tensor([[[-1.0, -1]]]), norm="layer", norm_weight=torch.tensor([10.0, 20]),
        norm_bias=torch.tensor([0.5, 0]), eps=0.0, return_sum=True, backend=backend,
    )  # fmt: skip
    assert u.flatten().tolist() == [1, 3]
    torch.testing.assert_close(y.flatten(), torch.tensor([-9.5, 20]))
    rms = vk.rearrange(torch.tensor([[[3.0, 4]]]), plans.keep(indices=torch.tensor([0]), n=1), norm="rms", eps=0.0)
    torch.testing.assert_close(rms.flatten(), torch.tensor([3.0, 4]) / 12.5**0.5)


@pytest.mark.parametrize("c", [1, 15, 64, 200])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_fused_is_torch_composed_with_gradients(c, norm):
    keep = torch.tensor([[5, 0, 3], [1, 1, 4]])
    leaves = [
        torch.randn(2, 6, c),
        torch.randn(c),
        torch.randn(c),
        torch.randn(c),
        torch.randn(c),
        torch.randn(2, 3, c),
    ]
    leaves = [v.requires_grad_() for v in leaves]
    x, bias, gate, weight, shift, residual = leaves
    y, u = vk.rearrange(
        x, plans.keep(indices=keep, n=6), bias=bias, gate=gate, scale=1.5, residual=residual, norm=norm,
        norm_weight=weight, norm_bias=shift, return_sum=True, backend="cpu" if not native_missing() else None,
    )  # fmt: skip
    total = residual + 1.5 * gate * (x[torch.arange(2)[:, None], keep] + bias)
    normed = (
        F.layer_norm(total, (c,), weight, shift) if norm == "layer" else F.rms_norm(total, (c,), weight, 1e-5) + shift
    )
    torch.testing.assert_close(u, total)
    torch.testing.assert_close(y, normed, rtol=1e-4, atol=1e-4)
    dy, du = torch.randn_like(y), torch.randn_like(u)
    got = torch.autograd.grad((y * dy).sum() + (u * du).sum(), leaves)
    want = torch.autograd.grad((normed * dy).sum() + (total * du).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)


@all_three
def test_gradients_reach_every_source_and_the_fill(backend):
    video = plans.pool(2, 2, 2).compose(plans.newline(2, 1, 1))
    plan = plans.assemble([("video", 4), ("text", 2)], video=video)
    text, frames = torch.randn(1, 2, 7, requires_grad=True), torch.randn(3, 8, 7, requires_grad=True)
    nl = torch.randn(1, 7, requires_grad=True)
    y = vk.rearrange([text, frames], plan, fill=nl, backend=backend)  # the text is shared by three samples
    assert y.shape == (3, 6, 7)
    dtext, dframes, dnl = torch.autograd.grad(y.sum(), [text, frames, nl])
    assert torch.equal(dtext, torch.full((1, 2, 7), 3.0))
    assert torch.equal(dframes, torch.full((3, 8, 7), 0.25))
    assert torch.equal(dnl, torch.full((1, 7), 6.0))


@all_three
def test_maximum_gradient_goes_to_the_winner_and_is_shared_by_ties(backend):
    x = torch.tensor([1.0, 5, 5, 2, 0, 3, 1, 1])[None, :, None].requires_grad_()
    y = vk.rearrange(x, plans.pool(2, 2, 2, mode="max"), backend=backend)
    assert y.flatten().tolist() == [5, 3]
    y.sum().backward()
    assert x.grad.flatten().tolist() == [0, 0.5, 0.5, 0, 0, 1, 0, 0]


@all_three
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_sets_adds_and_leaves_the_rest(backend, dtype):
    x = torch.tensor([[[1.0] * 5, [2] * 5, [4] * 5]]).to(dtype)
    plan = plans.keep(indices=torch.tensor([0, 1, 2]), n=3)
    rows = torch.tensor([3, -1, 0])
    out = torch.full((1, 4, 8), 10.0, dtype=dtype)[..., 1:6]
    vk.rearrange(x, plan, out=out, rows=rows, backend=backend)
    assert out[0, :, 0].tolist() == [4, 10, 10, 1]
    vk.rearrange(x, plan, out=out, rows=rows, accumulate=True, scale=2.0, backend=backend)
    assert out[0, :, 4].tolist() == [12, 10, 10, 3]


def test_out_refuses_gradients():
    with pytest.raises(ValueError, match=r"out must be used without gradients \(torch.no_grad\(\)\); an assemble plan"):
        vk.rearrange(torch.ones(1, 1, 2, requires_grad=True), plans.merge_order(1, 1, 1, 1), out=torch.ones(1, 1, 2))


def test_one_dtype_in_another_out():
    x = torch.randn(1, 4, 40)
    got = vk.rearrange(x, plans.merge_order(1, 2, 2), dtype=torch.bfloat16)
    assert torch.equal(got, x[:, [0, 1, 2, 3]].bfloat16())


@pytest.mark.skipif(bool(native_missing()), reason="no native")
def test_every_instruction_set_agrees():
    library = native()
    x = torch.randn(2, 30, 37).bfloat16()
    plan = plans.pool(1, 5, 6, mode="bilinear").compose(plans.newline(1, 3, 3))
    results, active = [], library.isa_active()
    for isa in library.isa_usable():
        library.isa_force(isa)
        y = vk.rearrange(x, plan, fill=torch.ones(1, 37).bfloat16(), norm="layer")
        moved = vk.rearrange(x, plans.from_einops("b s c -> c s b"))
        assert torch.equal(moved, x.permute(2, 1, 0))
        results.append(y.float())
    library.isa_force(active)
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=1e-2, atol=1e-2)
