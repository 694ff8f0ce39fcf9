"""vkernels.compat.flash_attn against what flash-attn's documentation says, on dense tensors.

Planted bugs that turn these red: top-left alignment; a window one key too wide; a causal window that keeps its right
side; sequences that see the next one's keys; cached keys read past their length; new keys written one place late;
queries of a non-causal call rotated by their own place; pairs the other way round; an ignored softcap; a packed form
that takes **kwargs, or whose default is another.
"""

import inspect

import dense
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vkernels as vk
from vkernels.compat import flash_attn as fa
from vkernels.compat.flash_attn import bert_padding, flash_attn_interface
from vkernels.compat.flash_attn.layers import rotary

WINDOWS = st.tuples(st.integers(-1, 4), st.integers(-1, 4))
LENGTHS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4)


def close(got, want, like=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=like, atol=like)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@given(st.integers(0, 9), st.integers(0, 9), st.booleans(), WINDOWS)
def test_a_padded_batch_follows_the_documented_rule(s_q, s_k, causal, window):
    q, k, v = torch.randn(2, s_q, 4, 8), torch.randn(2, s_k, 2, 8), torch.randn(2, s_k, 2, 8)
    out, lse, none = fa.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    want, want_lse = dense.attention(q, k, v, dense.band(s_q, s_k, causal, window))
    close(out, want)
    close(lse, want_lse)
    assert none is None


def test_the_pictures_of_the_documentation():
    """s_q = 2, s_k = 5 and s_q = 5, s_k = 2, as flash-attn draws them: uniform scores average the values seen."""
    q, v = torch.zeros(1, 2, 1, 8), torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 1, 8)
    out = fa.flash_attn_func(q, torch.zeros_like(v), v, causal=True)
    assert out[0, :, 0, 0].tolist() == [1.5, 2.0]
    q, v = torch.zeros(1, 5, 1, 8), torch.tensor([4.0, 6.0]).view(1, 2, 1, 1).expand(1, 2, 1, 8)
    out = fa.flash_attn_func(q, torch.zeros_like(v), v, causal=True)
    assert out[0, :, 0, 0].tolist() == [0.0, 0.0, 0.0, 4.0, 5.0]


@given(LENGTHS, st.booleans(), WINDOWS, st.integers(0, 2))
def test_sequences_end_to_end_see_themselves(lengths, causal, window, spare):
    cu_q, cu_k = starts([a for a, _ in lengths]), starts([b for _, b in lengths])
    q, k, v = torch.randn(int(cu_q[-1]) + spare, 4, 8), *torch.randn(2, int(cu_k[-1]) + spare, 2, 8)
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 6, 6, causal=causal, window_size=window, return_attn_probs=True
    )
    for i, (a, b) in enumerate(lengths):
        rows, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        want, want_lse = dense.attention(q[None, rows], k[None, keys], v[None, keys], dense.band(a, b, causal, window))
        close(out[rows], want[0])
        close(lse[:, rows], want_lse[0])
    assert not out[int(cu_q[-1]) :].any()  # rows of no sequence


def test_packed_forms_are_the_same_call():
    qkv, cu = torch.randn(2, 6, 3, 4, 8), starts([6, 6])
    want = fa.flash_attn_func(*qkv.unbind(2), causal=True, softmax_scale=0.3)
    flat = qkv.flatten(0, 1)
    assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True), want)
    assert torch.equal(fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], softmax_scale=0.3, causal=True), want)
    close(fa.flash_attn_varlen_qkvpacked_func(flat, cu, 6, softmax_scale=0.3, causal=True), want.flatten(0, 1))
    kv = fa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 6, 6, softmax_scale=0.3, causal=True)
    close(kv, want.flatten(0, 1))


def test_gradients_through_output_and_lse():
    q = torch.randn(5, 4, 8, requires_grad=True)
    k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in "kv")
    cu_q, cu_k, weight = starts([2, 3]), starts([3, 4]), torch.randn(5, 4, 8)
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, causal=True, return_attn_probs=True)
    got = torch.autograd.grad((out * weight).sum() + lse.sum(), (q, k, v))
    total = 0.0
    for a, b, c, d in ((0, 2, 0, 3), (2, 5, 3, 7)):
        o, l = dense.attention(q[None, a:b], k[None, c:d], v[None, c:d], dense.band(b - a, d - c, True))  # noqa: E741
        total = total + (o[0] * weight[a:b]).sum() + l.sum()
    for mine, theirs in zip(got, torch.autograd.grad(total, (q, k, v)), strict=True):
        close(mine, theirs)


def test_a_plan_is_kept_while_its_lengths_are():
    """The layers of a model share a plan; another tensor, or the same one changed, makes another."""
    q, kv, cu = torch.randn(6, 2, 8), torch.randn(2, 6, 2, 8), starts([2, 4])
    first = flash_attn_interface._varlen_plan(cu, cu, 6, 6, vk.compat.intervals.Band())
    assert flash_attn_interface._varlen_plan(cu, cu, 6, 6, vk.compat.intervals.Band()) is first
    before = fa.flash_attn_varlen_func(q, *kv, cu, cu, 4, 4)
    cu.copy_(starts([3, 3]))
    after = fa.flash_attn_varlen_func(q, *kv, cu, cu, 3, 3)
    assert torch.equal(after, fa.flash_attn_varlen_func(q, *kv, starts([3, 3]), starts([3, 3]), 3, 3))
    assert not torch.equal(before, after)


def test_it_traces_whole():
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind()
    cu = starts([2, 4])
    for function in (
        lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 4, 4, causal=True),
    ):
        whole = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(q, k, v), function(q, k, v))


# ---- a cache of the caller's


def cached(lengths, room, m=2, d=8):
    """Caches (b room m d) with NaN behind the lengths: reading there shows."""
    k, v = torch.full((2, len(lengths), room, m, d), torch.nan)
    for i, n in enumerate(lengths):
        k[i, :n], v[i, :n] = torch.randn(2, n, m, d)
    return k, v


@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_a_cache_is_written_and_read_to_its_length(new, causal):
    lengths = [4, 0, 7]
    k_cache, v_cache = cached(lengths, 10)
    old_k, old_v = k_cache.clone(), v_cache.clone()
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(3, new, 2, 8), torch.randn(3, new, 2, 8)
    held = torch.tensor(lengths, dtype=torch.int32)
    given = (k, v) if new else (None, None)
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, *given, cache_seqlens=held, causal=causal, return_softmax_lse=True
    )
    for i, n in enumerate(lengths):
        keys, values = torch.cat([old_k[i, :n], k[i]])[None], torch.cat([old_v[i, :n], v[i]])[None]
        want, want_lse = dense.attention(q[i : i + 1], keys, values, dense.band(2, n + new, causal))
        close(out[i], want[0])
        close(lse[i], want_lse[0])
        assert torch.equal(k_cache[i, n : n + new], k[i])
        assert torch.equal(k_cache[i, n + new :].isnan(), old_k[i, n + new :].isnan())


def test_pages_batch_indices_and_left_padding():
    lengths = [5, 3]
    k_cache, v_cache = cached(lengths, 8)
    q, held = torch.randn(2, 1, 4, 8), torch.tensor(lengths, dtype=torch.int32)
    want = fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=held)
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    pages_k, pages_v = torch.full((2, 4, 4, 2, 8), torch.nan)
    for i in range(2):
        for j in range(2):
            pages_k[table[i, j]], pages_v[table[i, j]] = k_cache[i, 4 * j : 4 * j + 4], v_cache[i, 4 * j : 4 * j + 4]
    assert torch.equal(fa.flash_attn_with_kvcache(q, pages_k, pages_v, cache_seqlens=held, block_table=table), want)
    new = torch.randn(2, 2, 1, 2, 8)
    fa.flash_attn_with_kvcache(q, pages_k, pages_v, *new, cache_seqlens=held, block_table=table)
    assert torch.equal(pages_k[0, 1], new[0, 0, 0])  # sequence 0, token 5: its second page, row 1
    assert torch.equal(pages_v[1, 3], new[1, 1, 0])  # sequence 1, token 3: its first page, row 3

    swapped = torch.tensor([1, 0], dtype=torch.int32)
    out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=held.flip(0), cache_batch_idx=swapped)
    for i, j in ((0, 1), (1, 0)):
        n = lengths[j]
        close(out[i], dense.attention(q[i : i + 1], k_cache[None, j, :n], v_cache[None, j, :n], dense.band(1, n))[0][0])
    pad = torch.tensor([2, 1], dtype=torch.int32)
    out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=held, cache_leftpad=pad)
    for i, n in enumerate(lengths):
        keys, values = k_cache[None, i, pad[i] : n], v_cache[None, i, pad[i] : n]
        close(out[i], dense.attention(q[i : i + 1], keys, values, dense.band(1, keys.shape[1]))[0][0])


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_places_in_a_cache(causal):
    """Keys at their place; queries too if causal, else all at the cache's end."""
    lengths = [4, 0]
    k_cache, v_cache = cached(lengths, 8)
    old_k, held = k_cache.clone(), torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(2, 3, 4, 8), *torch.randn(2, 2, 3, 2, 8)
    angle = torch.randn(10, 3)
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angle.cos(), angle.sin(), held, causal=causal, rotary_interleaved=False
    )

    def turned(x, places):
        a = angle[places][:, None].double()
        x1, x2, rest = x[..., :3].double(), x[..., 3:6].double(), x[..., 6:].double()
        return torch.cat([x1 * a.cos() - x2 * a.sin(), x2 * a.cos() + x1 * a.sin(), rest], -1)

    for i, n in enumerate(lengths):
        places = n + torch.arange(3)
        rotated = turned(q[i], places if causal else torch.full((3,), n))
        keys = torch.cat([old_k[i, :n].double(), turned(k[i], places)])
        close(k_cache[i, n : n + 3], keys[n:])
        want = dense.attention(rotated[None], keys[None], v_cache[None, i, : n + 3], dense.band(3, n + 3, causal))[0]
        close(out[i], want[0])


# ---- rotary, padding


def by_hand(x, cos, sin, interleaved):
    """Complex numbers: another formulation of a turn."""
    size = 2 * cos.shape[-1]
    pairs = x[..., :size].double()
    pairs = pairs.unflatten(-1, (-1, 2)) if interleaved else pairs.unflatten(-1, (2, -1)).transpose(-1, -2)
    turn = torch.complex(cos.double(), sin.double())[..., None, :]
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    out = out.flatten(-2) if interleaved else out.transpose(-1, -2).flatten(-2)
    return torch.cat([out, x[..., size:].double()], -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_follows_offsets_and_sequences(interleaved):
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(12, 3)
    cos, sin = angle.cos(), angle.sin()
    close(rotary.apply_rotary_emb(x, cos, sin, interleaved), by_hand(x, cos[:5], sin[:5], interleaved))
    offsets = torch.tensor([7, 2])
    at = offsets[:, None] + torch.arange(5)
    want = by_hand(x, cos[at], sin[at], interleaved)
    close(rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets), want)
    flat = torch.cat([x[0, :4], x[1, :3]])
    got = rotary.apply_rotary_emb(flat, cos, sin, interleaved, cu_seqlens=starts([4, 3]), seqlen_offsets=offsets)
    close(got, torch.cat([want[0, :4], want[1, :3]]))
    same = x.clone()
    assert rotary.apply_rotary_emb(same, cos, sin, interleaved, inplace=True, seqlen_offsets=offsets) is same
    close(same, want)


@pytest.mark.parametrize("grad", [False, True])
def test_packed_rotary_in_place(grad):
    angle = torch.randn(5, 4)
    cos, sin, leaf = angle.cos(), angle.sin(), torch.randn(2, 5, 3, 2, 8, requires_grad=grad)
    qkv = leaf * 1.0
    out = rotary.apply_rotary_emb_qkv_(qkv, cos, sin)
    assert out is qkv
    want = torch.stack([*(by_hand(leaf[:, :, i], cos, sin, False) for i in (0, 1)), leaf[:, :, 2].double()], 2)
    close(out, want)
    if grad:
        weight = torch.randn_like(leaf)
        mine, theirs = (torch.autograd.grad((y * weight).sum(), leaf, retain_graph=True)[0] for y in (out, want))
        close(mine, theirs)
    grouped = torch.cat([leaf[:, :, 0], leaf[:, :, 1, :1], leaf[:, :, 2, :1]], 2).detach()  # 2 query heads, 1 key head
    got = rotary.apply_rotary_emb_qkv_(grouped.clone(), cos, sin, num_heads_q=2)
    close(got[:, :, :3], torch.cat([want[:, :, 0], want[:, :, 1, :1]], 2))
    assert torch.equal(got[:, :, 3:], grouped[:, :, 3:])
    kv = leaf[:, :, 1:].detach().clone()
    close(rotary.apply_rotary_emb_kv_(kv, cos, sin), want[:, :, 1:])


def test_rotary_module():
    rope = rotary.RotaryEmbedding(8)
    qkv = torch.randn(1, 4, 3, 2, 8)
    frequency = 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    angle = (torch.arange(4)[:, None] + 3) * frequency
    want = by_hand(qkv[:, :, 0], angle.cos(), angle.sin(), False)
    q, kv = rope(qkv[:, :, 0], qkv[:, :, 1:].clone(), seqlen_offset=3)
    close(q, want)
    close(rope(qkv.clone(), seqlen_offset=3)[:, :, 0], want)
    close(kv[:, :, 0], by_hand(qkv[:, :, 1], angle.cos(), angle.sin(), False))
    assert rope.tables(2, qkv.bfloat16())[0].dtype == torch.bfloat16


def test_padding_and_back():
    x = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
    tokens, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 11, 12, 13]
    assert cu.tolist() == [0, 2, 2, 5]
    assert (longest, used.tolist()) == (3, [2, 0, 3])
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    _, indices, cu, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (cu.tolist(), longest, used.tolist()) == ([0, 3, 3, 7], 4, [2, 0, 3])
    lengths = torch.tensor([[2, 1, 0, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    _, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert (indices.tolist(), cu.tolist(), longest) == ([0, 1, 2, 5, 6, 7, 8, 9], [0, 2, 3, 8], 5)


# ---- refusals

x = torch.randn(1, 4, 2, 8)
CU = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: fa.flash_attn_func(x, x, x, dropout_p=0.1),
            "dropout_p must be 0, there is no dropout kernel, got 0.1",
        ),
        (lambda: fa.flash_attn_func(x, x, x, softcap=30.0), "softcap must be 0, there is no softcap kernel, got 30.0"),
        (lambda: fa.flash_attn_func(x, x, x, alibi_slopes=torch.ones(2)), "alibi_slopes must be None"),
        (lambda: fa.flash_attn_func(x, x, x, window_size=(-2, 0)), "window_size must be two integers of at least -1"),
        (lambda: fa.flash_attn_func(x[0], x, x), "q must have shape"),
        (lambda: fa.flash_attn_varlen_func(x[0], x[0], x[0], CU + 1, CU, 4, 4), "cu_seqlens_q must start at 0"),
        (lambda: fa.flash_attn_varlen_func(x[0], x[0], x[0], CU, CU * 2, 4, 4), "cu_seqlens_k must start at 0"),
        (lambda: fa.flash_attn_varlen_func(x[0], x[0], x[0], CU.float(), CU, 4, 4), "cu_seqlens_q must be int32"),
        (
            lambda: fa.flash_attn_varlen_qkvpacked_func(torch.stack([x[0]] * 3, 1), CU * 2, 4),
            "flash_attn_varlen_qkvpacked_func: cu_seqlens must start at 0",
        ),
        (lambda: fa.flash_attn_with_kvcache(x, x, x, x, x), "cache_seqlens must be given with k"),
        (lambda: fa.flash_attn_with_kvcache(x, x, x, x, x, cache_seqlens=1), "leave room for 4 new tokens in 4"),
        (lambda: fa.flash_attn_with_kvcache(x, x, x, rotary_cos=x[0, :, 0]), "rotary_cos must come with rotary_sin"),
        (lambda: fa.flash_attn_with_kvcache(x, x, x, softcap=1.0), "softcap must be 0"),
        (lambda: rotary.apply_rotary_emb(x, *torch.ones(2, 3, 4)), "stay within the 3 rows of cos and sin, got 0..4"),
        (lambda: rotary.RotaryEmbedding(8, scale_base=512), "scale_base must be None, there is no xPos kernel"),
        (lambda: rotary.apply_rotary_emb_qkv_(x, *torch.ones(2, 4, 4)), "num_heads_q must leave as many keys"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(call, sentence):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=sentence.replace("(", r"\(")):
        call()


# flash-attn 2.8.3, written down by hand; the three index functions are an autograd function's `apply` there
OPTIONS = """dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False"""
LENGTHS_OF = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    fa.flash_attn_func: f"q, k, v, {OPTIONS}",
    fa.flash_attn_qkvpacked_func: f"qkv, {OPTIONS}",
    fa.flash_attn_kvpacked_func: f"q, kv, {OPTIONS}",
    fa.flash_attn_varlen_func: f"q, k, v, {LENGTHS_OF}, {OPTIONS}, block_table=None",
    fa.flash_attn_varlen_qkvpacked_func: f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    fa.flash_attn_varlen_kvpacked_func: f"q, kv, {LENGTHS_OF}, {OPTIONS}",
    fa.flash_attn_with_kvcache: """q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False""",
    bert_padding.index_first_axis: "input, indices",
    bert_padding.index_put_first_axis: "values, indices, first_axis_dim",
    bert_padding.unpad_input: "hidden_states, attention_mask, unused_mask=None",
    bert_padding.unpad_input_for_concatenated_sequences: "hidden_states, attention_mask_in_length",
    bert_padding.pad_input: "hidden_states, indices, batch, seqlen",
    rotary.apply_rotary_emb: """x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
        max_seqlen=None""",
    rotary.apply_rotary_emb_qkv_: """qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0,
        num_heads_q=None""",
    rotary.apply_rotary_emb_kv_: "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    rotary.RotaryEmbedding.__init__: "self, dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    rotary.RotaryEmbedding.forward: "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_arguments_and_defaults_are_those_of_flash_attn(function):
    expected = inspect.signature(eval(f"lambda {' '.join(SIGNATURES[function].split())}: None"))
    got, want = (
        [(p.name, repr(p.default), p.kind) for p in signature.parameters.values()]
        for signature in (inspect.signature(function), expected)
    )
    assert got == want


def test_no_public_function_lacks_a_signature_above():
    modules = {fa.flash_attn_interface: "flash_attn", bert_padding: "", rotary: "apply_rotary"}
    for module, start in modules.items():
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith(start) and function.__module__ == module.__name__ and not name.startswith("_"):
                assert function in SIGNATURES
    assert {getattr(fa, name) for name in fa.__all__} <= set(SIGNATURES)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (fa.flash_attn_qkvpacked_func, (torch.zeros(1, 4, 3, 2, 8),)),
        (fa.flash_attn_kvpacked_func, (x, torch.zeros(1, 4, 2, 2, 8))),
        (fa.flash_attn_varlen_qkvpacked_func, (torch.zeros(4, 3, 2, 8), CU, 4)),
        (fa.flash_attn_varlen_kvpacked_func, (x[0], torch.zeros(4, 2, 2, 8), CU, CU, 4, 4)),
    ],
)
def test_a_packed_form_refuses_in_its_own_name(function, tensors):
    name = function.__name__
    with pytest.raises(TypeError, match=f"^{name}\\(\\) got an unexpected keyword argument 'scale'"):
        function(*tensors, scale=1.0)
    for wrong in ({"dropout_p": 0.1}, {"softcap": 1.0}, {"alibi_slopes": torch.ones(2)}):
        with pytest.raises(NotImplementedError, match=f"^{name}: {next(iter(wrong))} must be"):
            function(*tensors, **wrong)
    with pytest.raises(ValueError, match=f"^{name}: window_size must be two integers"):
        function(*tensors, window_size=(-2, 0))
    with pytest.raises(ValueError, match=f"^{name}: (qkv|q) must have shape"):
        function(*(t[0] if isinstance(t, torch.Tensor) and t.dim() > 2 else t for t in tensors))
