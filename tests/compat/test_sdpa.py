"""vk.sdpa against torch's, and the modules of vk.nn against their formulas.

Planted bugs that turn these red: bottom-right causal; an additive mask read upside down; runs that lose their last key;
a CLS that the temporal half changes.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vkernels as vk

MASKS = st.sampled_from(["none", "causal", "padding", "rows", "broadcast"])


@given(MASKS, st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_it_is_torchs(kind, s_q, s_k, additive):
    q, k, v = torch.randn(2, 4, s_q, 8), *torch.randn(2, 2, 2, s_k, 8)
    mask, causal = None, kind == "causal"
    if kind == "padding":
        mask = (torch.arange(s_k) < torch.tensor([[1], [s_k]]))[:, None, None]
    elif kind in ("rows", "broadcast"):
        mask = torch.rand(1 if kind == "broadcast" else 2, 1, s_q, s_k) < 0.6
        mask[..., 0] = True  # torch has NaN where a row sees nothing
        mask &= F.pad(mask.to(torch.int8), (1, 0)).diff(dim=-1).eq(1).cumsum(-1) <= 3
    want = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.4, enable_gqa=True)
    if additive and mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = vk.sdpa(q, k, v, mask, is_causal=causal, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if mask is None:
        flat = vk.sdpa(q[0], k[0], v[0], is_causal=causal, scale=0.4, enable_gqa=True)
        torch.testing.assert_close(flat, want[0], rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_gives_zero():
    q, mask = torch.randn(1, 1, 3, 8), torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    assert not vk.sdpa(q, q, q, mask)[0, 0, 1].any()


def test_it_takes_masks_as_values():
    grid = vk.Grid(3, 1, 2)
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    mask = vk.VideoMask.frame_causal(grid)
    want = F.scaled_dot_product_attention(q, k, v, mask.dense())
    torch.testing.assert_close(vk.sdpa(q, k, v, mask), want, rtol=1e-5, atol=1e-5)


q = torch.randn(1, 2, 8, 8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vk.sdpa(q, q, q, dropout_p=0.1), "dropout_p must be 0"),
        (lambda: vk.sdpa(q, q, q, torch.eye(8).bool(), is_causal=True), "attn_mask must be None with is_causal"),
        (lambda: vk.sdpa(q, q[:, :1], q[:, :1]), "without enable_gqa"),
        (lambda: vk.sdpa(q, q, q, torch.rand(8, 8)), "no kernel for additive biases"),
        (lambda: vk.sdpa(q, q, q, torch.ones(1, 2, 8, 8).bool()), "one mask for all heads"),
        (lambda: vk.sdpa(q, q, q, (torch.arange(8) % 2).bool().expand(8, 8)), "at most 3 runs of keys"),
        (lambda: vk.sdpa(q[0, 0], q, q), "have shape"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=sentence):
        call()


def attend(module, x):
    """Plain attention of one token list by a module's weights."""
    b, s, c = x.shape
    q, k, v = module.qkv(x).view(b, s, 3, module.heads, -1).permute(2, 0, 3, 1, 4)
    return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, c))


@pytest.mark.parametrize("module", [vk.nn.DividedSpaceTimeAttention, vk.nn.BTAdapterLayer])
def test_divided_blocks_are_timesformers(module):
    b, t, h, w, c = 2, 3, 2, 2, 32
    block, x = module(c, 4), torch.randn(b, 1 + t * h * w, c)
    torch.nn.init.normal_(block.temporal_fc.weight, std=0.3)
    cls, patches = x[:, :1], x[:, 1:].view(b, t, h * w, c)
    z = patches.transpose(1, 2).reshape(b * h * w, t, c)
    z = block.temporal_fc(attend(block.temporal, block.temporal_norm(z)))
    patches = patches + z.view(b, h * w, t, c).transpose(1, 2)
    frames = torch.cat([cls[:, None].expand(b, t, 1, c), patches], 2).flatten(0, 1)
    z = attend(block.spatial, block.spatial_norm(frames)).view(b, t, 1 + h * w, c)
    want = torch.cat([cls + z[:, :, 0].mean(1, keepdim=True), (patches + z[:, :, 1:]).flatten(1, 2)], 1)
    if module is vk.nn.BTAdapterLayer:
        want = want + block.mlp(block.mlp_norm(want))
    got = block(x, vk.Grid(t, h, w))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), list(block.parameters())) for y in (got, want))
    for a, b_ in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b_, rtol=1e-3, atol=1e-4)


def test_a_new_branch_is_the_image_model():
    block, x = vk.nn.BTAdapterLayer(32, 4), torch.randn(1, 9, 32)
    still = block.temporal_fc(block.temporal(block.temporal_norm(x), vk.Grid(2, 2, 2)))
    assert not still.any()


def test_rotary_module_turns_text_and_video():
    rope = vk.nn.VideoRotaryEmbedding(vk.RopeSpec.build(16, axes="mrope", sections=(2, 3, 3)), "qwen2_vl")
    parts = [2, (2, 2, 1), 1]
    q, k = torch.randn(1, 7, 4, 16), torch.randn(1, 7, 2, 16)
    pos = vk.rope_positions("qwen2_vl", parts)
    want = vk.apply_rope(q, k, rope.spec, pos)
    for got in (rope(q, k, parts), rope(q, k, pos=pos)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="parts must be given, or pos, not both"):
        rope(q, k)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width must be a multiple of the 5 heads, got 32"):
        vk.nn.TemporalAttention(32, 5)
