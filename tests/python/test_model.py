"""The reference video-LLM: the two implementations are one model, and that model is the one the papers describe.

The witnesses are worked by hand, transformers' own Llama, and recomputation without a cache; nothing learns the answer
from the other implementation alone.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("einops")

from transformers import LlamaForCausalLM
from vkernels_video.model import VideoLLM, preset
from vkernels_video.model.cache import DequantisingCache, dequantise, quantise
from vkernels_video.model.decoder import Prompt, Rotary

import vkernels as vk

QUESTION = "what?"


def tiny(**changes) -> VideoLLM:
    return VideoLLM(preset("tiny").with_options(**changes)).init_weights(seed=1).eval()


def pixels(frames: int) -> Tensor:
    return torch.randn(frames, 3, 42, 42, generator=torch.Generator().manual_seed(frames))


def close(a: Tensor, b: Tensor) -> None:
    """Two float32 computations of one thing in different orders: relative to the size of the whole."""
    assert a.shape == b.shape
    assert (a - b).norm() <= 1e-4 * b.norm()


def agree(fast, eager) -> None:
    """The same generation: the same tokens, and logits to rounding until something is quantised. Afterwards rounding
    may move a key across the edge between two codes, and with it a row of logits by less than 1 % (measured: 0.07 %).
    """
    assert fast.prompt == eager.prompt
    assert fast.tokens == eager.tokens
    close(fast.logits[:1], eager.logits[:1])
    assert ((fast.logits - eager.logits).norm(dim=1) <= 0.01 * eager.logits.norm(dim=1)).all()


# --- one model, two implementations


@pytest.mark.parametrize("frame_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("frames", [1, 4, 10])
def test_implementations_generate_the_same(frames, frame_attention):
    model = tiny(frame_attention=frame_attention)
    eager = model.generate(pixels(frames), QUESTION, 40, "eager")
    fast = model.generate(pixels(frames), QUESTION, 40, "vkernels")
    agree(fast, eager)


@pytest.mark.parametrize("kv", ["int8", "int4", "int2"])
def test_caches_of_every_width_agree(kv):
    """70 tokens: two groups leave the window while it answers, and are read as codes from that step on."""
    model = tiny(kv=kv)
    eager = model.generate(pixels(8), QUESTION, 70, "eager")
    fast = model.generate(pixels(8), QUESTION, 70, "vkernels")
    agree(fast, eager)


def test_gradients_agree():
    """A training step through encoder and projector gives every weight the same gradient."""
    grads = []
    for impl in ("eager", "vkernels"):
        model = tiny()
        model.connect(model.encode(pixels(8), impl), 8, [1], [2, 3], impl)[0].square().mean().backward()
        used = [model.encoder, model.projector]
        grads.append({name: p.grad for module in used for name, p in module.named_parameters()})
    for name, expected in grads[0].items():
        assert expected is not None, name
        assert (grads[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_the_video_matters():
    """Random weights, but not blind ones: another video gives other logits."""
    model = tiny()
    a = model.generate(pixels(8), QUESTION, 1).logits
    b = model.generate(pixels(8).flip(0), QUESTION, 1).logits
    assert (a - b).norm() > 0.05 * a.norm()


# --- interleaved clips


def test_a_clip_spans_the_video():
    """Clip j takes frames j, j + m, j + 2 m, ...: ten frames are three clips of four, two of them copies."""
    seen = []
    model = tiny()
    model.encoder.forward = lambda pixels, impl: seen.append(pixels[:, :, 0, 0, 0]) or pixels
    frames = torch.arange(10.0)[:, None, None, None].expand(10, 3, 42, 42)
    model.encode(frames)
    assert seen[0].tolist() == [[0, 3, 6, 9], [1, 4, 7, 9], [2, 5, 8, 9]]


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_connect_restores_the_order_of_time(impl):
    model = tiny()
    model.projector = torch.nn.Identity()
    m, t, tokens, width = 3, 4, 10, 128
    slot = torch.arange(t)[None, :, None, None] * m + torch.arange(m)[:, None, None, None]  # frame of clip j, slot k
    features = (slot * 1000 + torch.arange(tokens)[:, None]).float().expand(m, t, tokens, width)
    out, prompt = model.connect(features, 11, [7], [8, 9], impl)
    assert prompt == Prompt(1, 11, tokens, 2)
    expected = (torch.arange(11.0)[:, None] * 1000 + torch.arange(tokens)).flatten()
    assert torch.equal(out[0, 1:-2, 0], expected)
    assert torch.equal(out[0, 1:-2, -1], expected)
    assert torch.equal(out[0, [0, -2, -1]], model.decoder.embed_tokens.weight[[7, 8, 9]])


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_interleaving_is_not_chunking(impl):
    """Time mixes inside a clip, so the make-up of the clips changes the features; without it, not."""
    model = tiny()
    video = pixels(8)
    interleaved = model.connect(model.encode(video, impl), 8, [], [], impl)[0]
    chunked = model.projector(model.encoder(video.view(2, 4, 3, 42, 42), impl)).flatten(0, 2)[None]
    assert (interleaved - chunked).norm() > 0.05 * chunked.norm()
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.temporal_embedding.zero_()
            layer.temporal_attn.out_proj.weight.zero_()
            layer.temporal_attn.out_proj.bias.zero_()
    interleaved = model.connect(model.encode(video, impl), 8, [], [], impl)[0]
    chunked = model.projector(model.encoder(video.view(2, 4, 3, 42, 42), impl)).flatten(0, 2)[None]
    close(interleaved, chunked)


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_layer_is_attention_over_time_then_in_the_frame(impl):
    """Written once more as a full softmax with each pattern's mask."""
    layer, frames, tokens = tiny().encoder.layers[0], 4, 10
    x = torch.randn(2, frames * tokens, 64)
    number = torch.arange(frames * tokens)

    def attend(attention, x, same):
        q, k, v = (
            p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(same[:, None] != same, -torch.inf)
        return attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    with torch.no_grad():
        y = x + layer.temporal_embedding.repeat_interleave(tokens, dim=1)
        y = y + attend(layer.temporal_attn, layer.temporal_layer_norm1(y), number % tokens)
        y = y + attend(layer.self_attn, layer.layer_norm1(y), number // tokens)
        close(layer(x, frames, impl), y + layer.mlp(layer.layer_norm2(y)))


# --- the decoder


PROMPT = Prompt(before=1, frames=2, tokens=2, after=1)
BY_HAND = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1, 1],
]


def test_prefill_mask_by_hand():
    assert PROMPT.mask("bidirectional").dense().int().tolist() == BY_HAND
    assert torch.equal(PROMPT.mask("causal").dense(), torch.ones(6, 6).tril().bool())
    assert PROMPT.visible_pairs("bidirectional") == sum(map(sum, BY_HAND))
    assert PROMPT.visible_pairs("causal") == 21
    dense = tiny().decoder._dense_mask(torch.zeros(1, 6, 128), PROMPT)
    assert dense[0, 0].int().tolist() == BY_HAND


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_prefill_is_transformers_llama(impl):
    """The decoder's weights inside transformers' own LlamaForCausalLM give the same logits."""
    model = tiny(frame_attention="causal")
    weights = {n if n.startswith("lm_head") else f"model.{n}": w for n, w in model.decoder.state_dict().items()}
    llama = LlamaForCausalLM(model.decoder.llama)
    llama.load_state_dict(weights)
    x = torch.randn(1, 30, 128)
    with torch.no_grad():
        expected = llama(inputs_embeds=x).logits[:, -1]
        got = model.decoder(x, [], Rotary(10_000.0), model.new_caches(impl, 30), [Prompt(10, 0, 10, 20)], impl)
    close(got, expected)


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_steps_equal_recomputation(impl):
    """While nothing is quantised yet, decoding token by token is prefilling the longer prompt."""
    model = tiny(kv_residual=96)
    prompt = Prompt(2, 2, 10, 3)
    x = torch.randn(1, 32, 128)
    with torch.no_grad():
        caches = model.new_caches(impl, 64)
        model.decoder(x[:, :25], [], Rotary(20_000.0), caches, [prompt], impl)
        for i in range(25, 32):
            got = model.decoder(x[:, i : i + 1], [i], Rotary(20_000.0), caches, None, impl)
        longer = Prompt(2, 2, 10, 10)
        expected = model.decoder(x, [], Rotary(20_000.0), model.new_caches(impl, 64), [longer], impl)
    close(got, expected)


def test_ntk_base_of_the_paper():
    """d = 128: s = 2, 4, 8, 16 turn 10,000 into 20,221.26, 40,889.94, 82,684.62, 167,198.74."""
    expected = [10_000, 20_221.26, 40_889.94, 82_684.62, 167_198.74]
    wide = preset("tiny").with_options(width=128, heads=1, kv_heads=1, context=1000)
    for scaling in ("ntk", "dynamic"):
        decoder = wide.with_options(rope_scaling=scaling).decoder
        bases = [Rotary.scaled(decoder, 1000 * s).base for s in (1, 2, 4, 8, 16)]
        assert bases == pytest.approx(expected, abs=0.01)
    explicit = wide.with_options(rope_factor=4.0)
    assert Rotary.scaled(explicit.decoder, 10).base == pytest.approx(40_889.94, abs=0.01)
    later = explicit.with_options(rope_scaling="dynamic").decoder  # 4 x 1250 / 1000 - 3 = 2
    assert Rotary.scaled(later, 1250).base == pytest.approx(20_221.26, abs=0.01)
    assert Rotary.scaled(preset("tiny").with_options(rope_scaling="none").decoder, 10**6) == Rotary(10_000)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "dynamic", "yarn"])
def test_scaled_frequencies(scaling):
    """s = 4. Without scaling nothing changes; otherwise the slowest pair turns exactly four times slower, and the
    fastest only where positions themselves are divided."""
    decoder = preset("tiny").with_options(rope_scaling=scaling, context=64).decoder
    plain = Rotary.scaled(decoder, 64).spec(32).freq
    assert plain == Rotary(10_000.0).spec(32).freq
    freq = Rotary.scaled(decoder, 256).spec(32).freq
    ratio = {"none": 1.0}.get(scaling, 0.25)
    assert freq[-1] / plain[-1] == pytest.approx(ratio, rel=1e-12)
    assert freq[0] / plain[0] == pytest.approx(0.25 if scaling == "linear" else 1.0, rel=1e-12)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_implementations_agree_beyond_the_context(scaling):
    model = tiny(rope_scaling=scaling, rope_factor=None if scaling != "dynamic" else 2.0, kv="none")
    sides = [model.generate(pixels(10), QUESTION, 12, impl) for impl in ("eager", "vkernels")]
    assert sides[0].tokens == sides[1].tokens
    close(sides[1].logits, sides[0].logits)
    plain = tiny(rope_scaling="ntk", kv="none").generate(pixels(10), QUESTION, 1)
    assert (plain.logits - sides[0].logits[:1]).norm() > 1e-3 * plain.logits.norm()


# --- the plain cache


def test_quantisation_by_hand():
    """0 .. 3 in two bits: scale 1, zero 0, codes 0 1 2 3 packed lowest first: 0 + 1 * 4 + 2 * 16 + 3 * 64 = 228."""
    packed, scale, zero = quantise(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2)
    assert (packed.tolist(), scale.item(), zero.item()) == ([[228]], 1.0, 0.0)
    assert dequantise(packed, scale, zero, 2, torch.float32).tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_error_is_half_a_step(bits):
    x = torch.randn(50, 32)
    packed, scale, zero = quantise(x, bits)
    assert packed.shape == (50, 32 * bits // 8)
    error = (dequantise(packed, scale, zero, bits, torch.float32) - x).abs()
    # scale and zero are rounded to fp16, which moves the ends of the range by up to 2^-11 of their size
    assert (error <= scale.float() * 0.5 + x.abs().amax(1, keepdim=True) * 2**-9).all()


def test_constant_group_is_kept():
    packed, scale, zero = quantise(torch.full((1, 32), 0.5), 4)
    assert dequantise(packed, scale, zero, 4, torch.float32).unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("scheme", "group", "residual", "d"), [("int8", 64, 64, 64), ("int4", 64, 128, 64), ("int2", 32, 0, 32)]
)
def test_both_caches_hold_the_same_bits(scheme, group, residual, d):
    k, v = torch.randn(1, 300, 2, d), torch.randn(1, 300, 2, d)
    plain = DequantisingCache(scheme, group, residual)
    library = vk.KVCache(scheme, b=1, m=2, d=d, capacity=300, group=group, residual=residual, dtype=torch.float32)
    for part in (slice(0, 170), slice(170, 171), slice(171, 300)):
        library.append(k[:, part], v[:, part])
        plain.update(k[:, part].transpose(1, 2), v[:, part].transpose(1, 2))
    held = zip(plain.history(k.dtype), plain.recent, library.dequantised(), strict=True)
    for old, recent, expected in held:
        assert torch.equal(torch.cat([old, recent], dim=2).transpose(1, 2), expected)


def test_a_group_is_coded_before_it_is_read():
    """The prompt is read as it is; the token that fills a group reads the group's codes, itself among them."""
    k, v = torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32)
    cache = DequantisingCache("int2", group=32, residual=0)
    assert torch.equal(cache.update(k[:, :, :40], v[:, :, :40])[0], k[:, :, :40])
    read = cache.update(k[:, :, 40:63], v[:, :, 40:63])
    assert torch.equal(read[0][:, :, 32:], k[:, :, 32:63])
    read = cache.update(k[:, :, 63:], v[:, :, 63:])
    for got, held in zip(read, cache.history(k.dtype), strict=True):
        assert torch.equal(got, held)


def test_cache_token_by_token_equals_in_bulk():
    k, v = torch.randn(1, 2, 150, 32), torch.randn(1, 2, 150, 32)
    bulk, single = (DequantisingCache("int4", group=32, residual=32) for _ in range(2))
    bulk.update(k, v)
    for i in range(150):
        single.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert bulk.recent[0].shape == single.recent[0].shape
    for had, expected in zip(single.history(k.dtype), bulk.history(k.dtype), strict=True):
        assert torch.equal(had, expected)
    assert bulk.bytes == single.bytes < 150 * 2 * 2 * 32 * 4 / 2


# --- refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": 5}, r"config: decoder\.heads must divide decoder\.width, got 5"),
        ({"kv_heads": 3}, r"config: decoder\.kv_heads must divide decoder\.heads, got 3"),
        ({"rope_scaling": "longer"}, r"config: decoder\.rope_scaling must be one of none, linear, .*, got longer"),
        ({"rope_factor": 0.5}, r"config: decoder\.rope_factor must be None or at least 1, got 0\.5"),
        ({"kv": "int3"}, r"config: kv must be one of none, int8, int4, int2, got int3"),
    ],
)
def test_config_refusals(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        preset("tiny").with_options(**changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"config: size must be one of bt_llava_7b, .*, got huge"):
        preset("huge")
