"""vkernels.compat.xformers against xformers' own objects: its biases, materialised by itself, say who sees whom.

Planted bugs that turn these red: a causal block counted from the wrong corner; a window one key too wide; padded keys
read to the block's end; gappy blocks that run into each other; the end of
gappy pages taken for their length, or their start for none; a part without keys that poisons a merge.
"""

import logging

import dense
import pytest
import torch

import vkernels as vk
from vkernels.compat import xformers as xf

logging.getLogger("xformers").setLevel(logging.ERROR)  # that its own kernels are missing here is no news
peer = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed")

ours, S_Q, S_K = xf.attn_bias, 8, 12
BLOCKS, PADDED, GAPPY = ([3, 1, 4], [5, 1, 6]), ([3, 1, 4], 4, [3, 2, 4]), ([3, 1, 4], [0, 4, 6, 12], [3, 1, 5])
BIASES = {
    "LowerTriangularMask": lambda m: m.LowerTriangularMask(),
    "LowerTriangularFromBottomRightMask": lambda m: m.LowerTriangularFromBottomRightMask(),
    "LowerTriangularLocal": lambda m: m.LowerTriangularFromBottomRightMask().make_local_attention(3),
    "LocalAttentionFromBottomRightMask": lambda m: m.LocalAttentionFromBottomRightMask(2, 1),
    "BlockDiagonalMask": lambda m: m.BlockDiagonalMask.from_seqlens(*BLOCKS),
    "causal": lambda m: m.BlockDiagonalMask.from_seqlens(*BLOCKS).make_causal(),
    "causal_bottom_right": lambda m: m.BlockDiagonalMask.from_seqlens(*BLOCKS).make_causal_from_bottomright(),
    "local": lambda m: m.BlockDiagonalMask.from_seqlens(*BLOCKS).make_local_attention(2),
    "local_br": lambda m: m.BlockDiagonalMask.from_seqlens(*BLOCKS).make_local_attention_from_bottomright(2),
    "padded": lambda m: m.BlockDiagonalPaddedKeysMask.from_seqlens(*PADDED),
    "padded_causal": lambda m: m.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(*PADDED),
    "padded_local": lambda m: m.BlockDiagonalPaddedKeysMask.from_seqlens(*PADDED).make_local_attention(1, 1),
    "padded_causal_local": lambda m: m.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(*PADDED, 2),
    "gappy": lambda m: m.BlockDiagonalGappyKeysMask.from_seqlens(*GAPPY),
    "gappy_causal": lambda m: m.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(*GAPPY),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_means_what_it_means_to_xformers(name):
    q, k, v = torch.randn(1, S_Q, 4, 8), *torch.randn(2, 1, S_K, 4, 8)
    theirs, mine = BIASES[name](peer), BIASES[name](ours)
    law = theirs.materialize((S_Q, S_K))
    assert torch.equal(mine.materialize((S_Q, S_K)), law)
    want, want_lse = dense.attention(q, k, v, law == 0)
    for bias in (theirs, mine):
        out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
        assert torch.equal(xf.memory_efficient_attention(q, k, v, bias), out)


@pytest.mark.parametrize(
    "kind", ["PagedBlockDiagonalPaddedKeysMask", "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask"]
)
def test_pages(kind):
    table = torch.tensor([[2, 0], [3, 5]], dtype=torch.int32)
    q, k, v = torch.randn(1, 5, 2, 8), *torch.randn(2, 1, 24, 2, 8)
    for module in (peer, ours):
        bias = getattr(module, kind).from_seqlens([2, 3], [6, 7], table, 4)
        law = getattr(peer, kind).from_seqlens([2, 3], [6, 7], table, 4).materialize((5, 16))
        want = dense.attention(q, k, v, law == 0)[0]
        torch.testing.assert_close(xf.memory_efficient_attention(q, k, v, bias).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["PagedBlockDiagonalGappyKeysMask", "PagedBlockDiagonalCausalWithOffsetGappyKeysMask"])
def test_gappy_pages(kind):
    """Rows of 8 places, blocks of 12 as the gappy mask counts them."""
    table = torch.tensor([[2, 0], [3, 5]], dtype=torch.int32)
    made = {}
    for module in (peer, ours):
        gappy = module.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 15, 24], [6, 4])
        made[module] = gappy.make_paged(table, 4, 12, getattr(module, kind))
    law = made[peer].materialize((5, 16)) == 0  # 5 queries, 24 keys in 6 pages
    assert law.any(0).nonzero().flatten().tolist() == [0, 1, 2, 9, 10, 11, 15, 20, 21, 22]
    q, k, v = torch.randn(1, 5, 2, 8), *torch.randn(2, 1, 24, 2, 8)
    want = dense.attention(q, k, v, law)[0]
    direct = getattr(ours, kind).from_seqlens([2, 3], [1, 3], [6, 4], table, 4)
    for bias in (*made.values(), direct):
        torch.testing.assert_close(xf.memory_efficient_attention(q, k, v, bias).double(), want, rtol=1e-5, atol=1e-5)


def test_padded_keys_become_pages_of_another_length():
    """As in xformers, rows of pages need not be as long as the blocks that were padded."""
    table, q = torch.tensor([[1], [0]], dtype=torch.int32), torch.randn(1, 5, 2, 8)
    k, v = torch.randn(2, 1, 8, 2, 8)
    for module in (peer, ours):
        padded = module.BlockDiagonalPaddedKeysMask.from_seqlens([2, 3], 7, [3, 4])
        paged = padded.make_paged(table, 4, module.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask)
        for rows, keys, n in ((slice(0, 2), slice(4, 7), 3), (slice(2, 5), slice(0, 4), 4)):
            seen = dense.band(rows.stop - rows.start, n, True)
            want = dense.attention(q[:, rows], k[:, keys], v[:, keys], seen)[0]
            out = xf.memory_efficient_attention(q, k, v, paged)[:, rows]
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_every_bias_of_xformers_is_served_or_refused_by_sentence():
    names = {n for n, c in vars(peer).items() if isinstance(c, type) and issubclass(c, peer.AttentionBias)}
    assert names - set(ours.SERVED) == {"AttentionBias", "LowerTriangularMaskWithTensorBias"}
    assert not isinstance(ours.LowerTriangularMask(), ours.LowerTriangularMaskWithTensorBias)
    with pytest.raises(ImportError, match=r"a bias must be one of LowerTriangularMask.*VideoMask, got TreeMask"):
        from vkernels.compat.xformers.ops.fmha.attn_bias import TreeMask  # noqa: F401
    assert not hasattr(ours, "anything_else")


def test_layouts_share_one_answer():
    q, k, v = torch.randn(2, 5, 2, 3, 8), *torch.randn(2, 2, 6, 2, 1, 8)
    bias = ours.LowerTriangularMask()
    out, lse = xf.memory_efficient_attention_partial(q, k.expand(2, 6, 2, 3, 8), v.expand(2, 6, 2, 3, 8), bias)
    want, want_lse = dense.attention(
        q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0], dense.band(5, 6, True, bottom_right=False)
    )
    torch.testing.assert_close(out.flatten(2, 3).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.flatten(1, 2).double(), want_lse, rtol=1e-5, atol=1e-5)
    full = xf.memory_efficient_attention(q, *(x.expand(2, 6, 2, 3, 8).contiguous() for x in (k, v)), bias)
    torch.testing.assert_close(full, out, rtol=1e-5, atol=1e-5)
    one = xf.memory_efficient_attention(q[:, :, 0, 0], k[:, :, 0, 0], v[:, :, 0, 0], bias)
    torch.testing.assert_close(one, out[:, :, 0, 0], rtol=1e-5, atol=1e-5)


def test_lists_go_in_and_come_out():
    xs = [torch.randn(2, 3, 2, 8), torch.randn(1, 5, 2, 8)]
    for module in (peer, ours):
        bias, q = module.BlockDiagonalMask.from_tensor_list(xs)
        outs = bias.split(xf.memory_efficient_attention(q, q, q, bias.make_causal()))
        for x, out in zip(xs, outs, strict=True):
            want = dense.attention(x, x, x, dense.band(x.shape[1], x.shape[1], True))[0]
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_parts_merge_to_the_whole_with_gradients():
    q = torch.randn(2, 5, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in "kv")
    seen = torch.rand(2, 1, 5, 9) < 0.7
    seen[:, :, 0] = False  # a query that sees nothing at all
    seen[:, :, 1, :4] = False  # one that sees nothing of the first part
    whole = vk.attention(q, k, v, mask=vk.compat.intervals.runs(_three_runs(seen[:, 0]), "test"), return_lse=True)
    parts = []
    for keys in (slice(0, 4), slice(4, 9)):
        plan = vk.compat.intervals.runs(_three_runs(seen[:, 0])[..., keys], "test")
        parts.append(vk.attention(q, k[:, keys], v[:, keys], mask=plan, return_lse=True))
    for merged in (
        vk.merge_attentions(*zip(*parts, strict=True)),
        xf.merge_attentions(*(torch.stack(x) for x in zip(*parts, strict=True))),
    ):
        torch.testing.assert_close(merged[0], whole[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged[1], whole[1], rtol=1e-5, atol=1e-5)
        weight = torch.randn(2, 5, 4, 8)
        sees = whole[1] > -torch.inf
        mine, theirs = (
            torch.autograd.grad((o * weight).sum() + lse[sees].sum(), (q, k, v), retain_graph=True)
            for o, lse in (merged, whole)
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    grouped = [(o.unflatten(2, (2, 2)), lse.unflatten(1, (2, 2))) for o, lse in parts]
    out, lse = xf.merge_attentions(*(list(x) for x in zip(*grouped, strict=True)))
    assert torch.equal(out.flatten(2, 3), merged[0])
    assert torch.equal(lse.flatten(1, 2), merged[1])


def _three_runs(seen):
    runs = torch.nn.functional.pad(seen.to(torch.int8), (1, 0)).diff(dim=-1).eq(1).cumsum(-1)
    return seen & (runs <= 3)


def test_a_part_that_saw_nothing_may_hold_anything():
    o, lse = torch.full((1, 1, 1, 8), torch.nan), torch.full((1, 1, 1), -torch.inf)
    other = torch.ones(1, 1, 1, 8)
    out, total = vk.merge_attentions([o, other], [lse, torch.zeros(1, 1, 1)])
    assert torch.equal(out, other)
    assert total.item() == 0
    out, total = vk.merge_attentions([o, o], [lse, lse])
    assert not out.any()
    assert total.item() == -torch.inf


def test_indexing():
    x, source = torch.randn(6, 2, 4), torch.randn(2, 2, 4, requires_grad=True)
    index, scaling = torch.tensor([4, 1]), torch.randn(4, requires_grad=True)
    want = torch.index_add(x, 0, index, scaling * source, alpha=0.5)
    got = xf.scaled_index_add(x, index, source, scaling, 0.5)
    assert got is x
    assert torch.equal(got, want)
    sources, indices = [torch.randn(5, 3), torch.randn(4, 2)], [torch.tensor([4, 0]), torch.tensor([1])]
    want = torch.cat([s[i].flatten() for s, i in zip(sources, indices, strict=True)])
    assert torch.equal(xf.index_select_cat(sources, indices), want)


x, TABLE = torch.randn(1, 4, 2, 8), torch.tensor([[2, 0], [3, 5]], dtype=torch.int32)
GAPPY_MASK = ours.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 14, 24], [6, 4])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: xf.memory_efficient_attention(x, x, x, p=0.1), "p must be 0"),
        (lambda: xf.memory_efficient_attention(x, x, x, torch.zeros(1, 2, 4, 4)), "no kernel for additive biases"),
        (lambda: xf.memory_efficient_attention(x, x, x, peer.LowerTriangularMask().add_bias(x)), "additive biases"),
        (
            lambda: ours.LowerTriangularMask().add_bias(x),
            "bias must be left out, there is no kernel for additive biases",
        ),
        (lambda: ours.LowerTriangularMaskWithTensorBias(x), "scaled_dot_product_attention has one.*got a bias of"),
        (lambda: GAPPY_MASK.make_paged(TABLE, 4, 6, None), "notional_padding must be pages of 4, got 6"),
        (lambda: GAPPY_MASK.make_paged(TABLE, 4, 4, None), "lie within the 8 places of their sequence's pages"),
        (
            lambda: ours.PagedBlockDiagonalGappyKeysMask.from_seqlens([1], [0, 1], [1], TABLE, 4),
            "seqstarts must have 1",
        ),
        (lambda: xf.memory_efficient_attention(x, x, x, ours.BlockDiagonalMask.from_seqlens([3])), "have the 3 tokens"),
        (lambda: xf.memory_efficient_attention(x, x, x, object()), "attn_bias must be one of LowerTriangularMask"),
        (lambda: xf.memory_efficient_attention(x, x[0], x), "have one rank"),
        (lambda: ours.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]), "seqlens must fit in 2"),
        (lambda: vk.merge_attentions([x], [x[..., 0]]), "lses must have shape"),
        (lambda: vk.merge_attentions([], []), "outs must hold at least one part"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(call, sentence):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=sentence):
        call()
