"""Modeling files of 2023 to 2025, from their own wheels, stock against patched: LLaMA and CLIP of transformers 4.28,
4.31, 4.37, 4.45 and 4.48, Qwen2 of 4.45, LLaVA's flash-attention patch, BLIP-2's EVA ViT and Q-Former.

Planted, one at a time, and seen red: the rotation reversed; positions ignored; keys and values of the tuple swapped;
new keys before the cache; tables too short for a cache; a mask dropped; padding dropped; queries aligned to the first
keys of a cache; a static cache's place, and its positions, lost; a mask remembered for other sizes; the dense mask
kept; flash's implied causality forgotten; CLIP's scale; EVA's biases swapped; the Q-Former's mask dropped, and that of
its words taken for its frames; the eager function of 4.48 left alone.
"""

import copy
import importlib
import sys
import types
import weakref

import old_packages
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vkernels as vk

pytest.importorskip("transformers")
from vkernels_video.integrations import doctor, eras, zoo
from vkernels_video.integrations.eras import known, masks

LLAMA = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(max_position_embeddings=64, pad_token_id=0)
CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24)
TEXTS = [
    ("4.28.0", "llama", "eager"),
    ("4.31.0", "llama", "eager"),
    ("4.37.2", "llama", "eager"),
    ("4.37.2", "llama", "sdpa"),
    ("4.45.2", "llama", "eager"),
    ("4.45.2", "llama", "sdpa"),
    ("4.45.2", "qwen2", "sdpa"),
    ("4.48.3", "llama", "eager"),
    ("4.48.3", "llama", "sdpa"),
]
VERSIONS = sorted({version for version, _, _ in TEXTS})


def text(version, family="llama", how="eager", **more):
    """A decoder of that version, tiny, with grouped heads from where the file knows them."""
    file = old_packages.transformers_of(version, family)[family]
    name = {"llama": "Llama", "qwen2": "Qwen2"}[family]
    groups = {} if version == "4.28.0" else dict(num_key_value_heads=2)
    config = getattr(file.configuration, f"{name}Config")(**{**LLAMA, **groups, **more})
    config._attn_implementation = how
    model = getattr(file, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # their 0.02 makes attention nearly uniform
        parameter.data.normal_(std=0.3) if parameter.dim() > 1 else None
    return model


def padded(batch=2, tokens=9, pad=3):
    ids = torch.randint(3, 60, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def greedy(model, inputs, steps=5):
    """`generate` in small: the prompt, then one token at a time over the cache the model returns."""
    ids, mask, past, tokens = inputs["input_ids"], inputs["attention_mask"], None, []
    for _ in range(steps):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.cat(tokens, 1), past


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- decoders


@pytest.mark.parametrize(("version", "family", "how"), TEXTS)
def test_a_decoder_is_the_same_forward_backward_and_over_its_cache(version, family, how):
    model, inputs = text(version, family, how), padded()
    stock_gradients, (stock_tokens, stock_past) = gradients(model, inputs), greedy(model, inputs)
    report = eras.apply(model)
    verified = report.verify(inputs, tolerance=1e-4)
    assert (verified.calls_before, verified.calls_after, verified.idle) == (2, 2, ())
    report.reset()
    ours = gradients(model, inputs)
    assert ours.keys() == stock_gradients.keys()
    for name, want in stock_gradients.items():
        close(ours[name], want)
    tokens, past = greedy(model, inputs)
    assert torch.equal(tokens, stock_tokens)
    assert type(past) is type(stock_past)
    for got, want in zip(past, stock_past, strict=True):
        for x, y in zip(got, want, strict=True):
            close(x[1], y[1])  # of the row without padding: what a padded key's neighbours are is nobody's business
    assert report.calls == {"rope": 12, "attention": 12, "mask": 6}
    assert not any(seam.stock_calls for seam in report.seams)


@pytest.mark.parametrize("version", ["4.28.0", "4.37.2", "4.48.3"])
def test_without_padding_and_with_a_mask_of_another_length(version):
    """No padding takes the shared causal plan; several tokens over a cache are aligned to its end."""
    model, ids = text(version), torch.randint(3, 60, (2, 8))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        eras.apply(model)
        close(model(input_ids=ids).logits, want)
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        close(rest.logits, want[:, 5:])


class Largest(TorchDispatchMode):
    """The most elements of any tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            self.numel = max(self.numel, x.untyped_storage().nbytes() // 4 if isinstance(x, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_of_queries_times_keys_is_made(version):
    model, inputs = text(version, num_hidden_layers=1, max_position_embeddings=512), padded(tokens=400)
    with torch.no_grad():
        with Largest() as stock:
            model(**inputs)
        eras.apply(model)
        with Largest() as ours:
            model(**inputs)
    assert stock.numel >= 400 * 400
    assert ours.numel < 400 * 400 / 2


@pytest.mark.parametrize(("version", "how"), [("4.45.2", "eager"), ("4.45.2", "sdpa"), ("4.48.3", "sdpa")])
def test_a_static_cache(version, how):
    model, inputs = text(version, how=how), padded()
    caches = old_packages.beside(version, "cache_utils")

    @torch.no_grad()
    def run():
        more = dict(config=model.config, max_cache_len=16, device="cpu", dtype=torch.float32)
        cache = caches.StaticCache(**{"max_batch_size" if version < "4.46" else "batch_size": 2}, **more)
        made = []
        for begin, end in ((0, 9), (9, 10), (10, 12)):
            at = torch.arange(begin, end)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, end - 9), value=1)
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
            ids = inputs["input_ids"][:, at % 9]
            given = dict(attention_mask=mask, position_ids=places, past_key_values=cache, cache_position=at)
            made.append(model(input_ids=ids, use_cache=True, **given).logits[mask[:, begin:end].bool()])
        return torch.cat(made)

    want = run()
    report = eras.apply(model)
    close(run(), want)
    assert report.calls == {"rope": 6, "attention": 6, "mask": 3}


def test_checkpointed_layers_train_the_same():
    model, inputs = text("4.31.0"), padded()
    want = gradients(model, inputs)
    report = eras.apply(model)
    model.model.gradient_checkpointing = True
    model.train()
    ours = gradients(model, inputs)
    assert report.calls["attention"] == 4  # and again in the backward
    for name, gradient in want.items():
        close(ours[name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", ["4.28.0", "4.45.2"])
def test_half_precision_is_as_close_as_it_can_be(version, dtype):
    model, inputs = text(version), padded()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        model.to(dtype).float()
        exact = model(**inputs).logits[real]
        model.to(dtype)
        stock = (model(**inputs).logits[real] - exact).abs().max()
        eras.apply(model)
        ours = (model(**inputs).logits[real] - exact).abs().max()
    assert ours <= 2 * stock + torch.finfo(dtype).eps


# ---- LLaVA's patch of the class


@pytest.fixture
def llava(monkeypatch):
    """Its training file, run as it is: our functions are the flash_attn it imports, 4.31 its transformers."""
    from vkernels.compat import flash_attn
    from vkernels.compat.flash_attn import bert_padding, flash_attn_interface

    file = old_packages.transformers_of("4.31.0", "llama")["llama"]
    for kind, name in ((file.LlamaModel, "_prepare_decoder_attention_mask"), (file.LlamaAttention, "forward")):
        monkeypatch.setattr(kind, name, getattr(kind, name))  # put back at the end
    calls = []

    def counted(*args, **kwargs):
        calls.append("varlen")
        return flash_attn.flash_attn_varlen_qkvpacked_func(*args, **kwargs)

    monkeypatch.setattr(flash_attn_interface, "flash_attn_varlen_qkvpacked_func", counted)
    before_27 = types.SimpleNamespace(  # unpad_input returned four values, without the tokens each sequence uses
        pad_input=bert_padding.pad_input, unpad_input=lambda *given: bert_padding.unpad_input(*given)[:4]
    )
    modules = {"flash_attn": flash_attn, "flash_attn.bert_padding": before_27}
    modules |= {
        "flash_attn.flash_attn_interface": flash_attn_interface,
        "transformers.models.llama.modeling_llama": file,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    models = types.SimpleNamespace(llama=types.SimpleNamespace(modeling_llama=file))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(models=models))
    patch = old_packages.run_file("llava-torch==1.2.2.post1", "llava/train/llama_flash_attn_monkey_patch.py")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return patch.replace_llama_attn_with_flash_attn, calls


def test_llavas_flash_attention_patch_runs_on_the_drop_in_functions_and_can_be_patched_itself(llava):
    replace, calls = llava
    model, inputs = text("4.31.0"), padded()
    real = inputs["attention_mask"].bool()
    want, whole = gradients(model, inputs), model(input_ids=inputs["input_ids"]).logits
    replace()
    theirs = gradients(model, inputs)
    close(model(input_ids=inputs["input_ids"]).logits, whole)
    assert calls == ["varlen"] * 4
    calls.clear()
    report = eras.apply(model)
    ours = gradients(model, inputs)
    for name, gradient in want.items():
        close(theirs[name], gradient)
        close(ours[name], gradient)
    assert report.verify(inputs).idle == ()
    assert report.calls == {"rope": 4, "attention": 4, "mask": 2}
    first = model.model.layers[0].self_attn  # handed padding by somebody else's model, as theirs is
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        for mask in (inputs["attention_mask"], None):
            given = dict(attention_mask=mask, position_ids=inputs["position_ids"])
            got, wanted = first(x, **given)[0], type(first).forward(first, x, **given)[0]
            close(got[real], wanted[real])


# ---- vision


@pytest.mark.parametrize(
    ("version", "how"), [*((version, "eager") for version in VERSIONS), ("4.45.2", "sdpa"), ("4.48.3", "sdpa")]
)
def test_clip_is_the_same_forward_and_backward(version, how):
    file = old_packages.transformers_of(version, "clip")["clip"]
    config = file.configuration.CLIPVisionConfig(**CLIP, patch_size=8)
    config._attn_implementation = how
    model, pixels = file.CLIPVisionModel(config).eval(), torch.randn(3, 3, 24, 24)
    differs(model, lambda: model(pixels).last_hidden_state, "attention", 2)


def differs(model, run, kind, calls, tolerance=1e-4):
    """Stock against patched, forward and backward; our op ran `calls` times."""

    def both():
        model.zero_grad()
        out = run()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).mean().backward()
        return [out, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]

    want = both()
    report = eras.apply(model)
    for x, y in zip(both(), want, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert report.calls[kind] == calls
    assert not any(seam.stock_calls for seam in report.seams), report
    return report


def test_clips_text_masks_go_to_the_stock_forward_and_are_counted():
    file = old_packages.transformers_of("4.31.0", "clip")["clip"]
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = file.CLIPTextModel(file.configuration.CLIPTextConfig(**sizes, max_position_embeddings=16)).eval()
    ids = torch.randint(3, 60, (2, 7))
    want = model(ids).last_hidden_state
    report = eras.apply(model)
    close(model(ids).last_hidden_state, want)
    assert "1 on the stock path (a dense mask is given)" in str(report)


def test_the_eva_tower_of_blip2_and_st_llm():
    file = old_packages.lavis("lavis/models/eva_vit.py")
    tower = file.VisionTransformer(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, qkv_bias=True).eval()
    for block in tower.blocks:
        for bias in (block.attn.q_bias, block.attn.v_bias):
            torch.nn.init.normal_(bias)
    pixels = torch.randn(2, 3, 16, 16)
    differs(tower, lambda: tower(pixels), "attention", 2)
    eras.restore(tower)
    relative = file.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=3, use_rel_pos_bias=True
    )
    want = relative.eval()(pixels)
    report = eras.apply(relative)
    close(relative(pixels), want)
    assert "1 on the stock path (a relative position bias is given)" in str(report)


def test_the_q_former_of_blip2_and_st_llm():
    file = old_packages.lavis("lavis/models/blip2_models/Qformer.py")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    sizes |= dict(
        max_position_embeddings=32, hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.0, type_vocab_size=2
    )
    sizes |= dict(attention_probs_dropout_prob=0.1, add_cross_attention=True, cross_attention_freq=2, encoder_width=24)
    config = old_packages.PretrainedConfig(**sizes, query_length=5, initializer_range=0.2, pad_token_id=0)
    model = file.BertModel(config, add_pooling_layer=False).eval()
    queries, frames = torch.randn(2, 5, 32), torch.randn(2, 11, 24)
    words, ids = torch.tensor([[1] * 9, [1] * 7 + [0] * 2]), torch.randint(3, 60, (2, 4))
    seen = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])

    def run():
        given = dict(encoder_hidden_states=frames, encoder_attention_mask=seen, attention_mask=words)
        return model(input_ids=ids, query_embeds=queries, return_dict=True, **given).last_hidden_state[:, :7]

    differs(model, run, "attention", 3)
    report = eras.restore(model)
    eras.apply(model)
    model.train()
    run()
    report = eras.restore(model)
    assert "stock path (attention dropout of 0.1)" in str(report)


# ---- one instance, and back; misuse


def test_restore_leaves_the_model_and_another_of_its_class_as_they_were():
    model, other, inputs = text("4.37.2"), text("4.37.2"), padded()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    classes = [dict(vars(kind)) for kind in {type(module) for module in model.modules()}]
    report = eras.apply(model)
    assert eras.apply(model) is report
    other(**inputs)
    assert report.calls == {"rope": 0, "attention": 0, "mask": 0}
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert "LlamaForCausalLM, transformers_4_37_2.models.llama.modeling_llama, in place" in str(report)
    assert eras.restore(model) is report
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert [dict(vars(kind)) for kind in {type(module) for module in model.modules()}] == classes
    with pytest.raises(ValueError, match="restore: model must be one that apply has changed"):
        eras.restore(model)
    with eras.accelerated(model, rope=False) as report:
        model(**inputs)
    assert report.calls == {"attention": 2, "mask": 1}
    assert "rope=False" in str(report)
    assert "forward" not in model.model.layers[0].self_attn.__dict__


def test_rope_alone():
    for version in ("4.28.0", "4.37.2", "4.45.2"):
        model, inputs = text(version), padded()
        report = eras.apply(model, attention=False)
        assert report.verify(inputs, tolerance=1e-4).idle == ()
        assert report.calls == {"rope": 2}


def test_what_attention_does_not_do_goes_to_the_stock_forward_with_its_reason():
    model, inputs = text("4.45.2", attention_dropout=0.5), padded()
    report = eras.apply(model)
    model.train()
    torch.manual_seed(0)
    got = model(**inputs).logits
    with report.suspended():
        torch.manual_seed(0)
        close(got, model(**inputs).logits)
    assert "2 on the stock path (attention dropout of 0.5)" in str(report)
    model.eval()
    report.reset()
    four = torch.full((2, 1, 9, 9), torch.finfo(torch.float32).min).triu(1)
    got = model(input_ids=inputs["input_ids"], attention_mask=four).logits
    with report.suspended():
        close(got, model(input_ids=inputs["input_ids"], attention_mask=four).logits)
    assert "2 on the stock path (a dense mask is given)" in str(report)


def test_misuse_is_a_sentence_and_the_model_as_it_was():
    model, inputs = text("4.31.0"), padded()
    with pytest.raises(ValueError, match=r"apply: model must have attention of transformers 4 .*got Linear"):
        eras.apply(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="apply: model must be a torch module, got str"):
        eras.apply("llama")
    with pytest.raises(ValueError, match="not be compiled yet"):
        eras.apply(torch.compile(model))
    with torch.device("meta"), pytest.raises(ValueError, match="be on a real device"):
        eras.apply(torch.nn.Linear(2, 2))
    eras.apply(model)
    with pytest.raises(ValueError, match="be restored before other options"):
        eras.apply(model, rope=False)
    with pytest.raises(ValueError, match="output_attentions must be False, the weights are never formed"):
        model(**inputs, output_attentions=True)
    eras.restore(model)
    model.model.layers[1].self_attn.k_proj.bfloat16()
    with pytest.raises(ValueError, match=r"one dtype within an attention module \(model.layers.1.self_attn\)"):
        eras.apply(model)
    assert "forward" not in model.model.layers[0].self_attn.__dict__


def test_a_form_of_no_era_raises_or_is_reported(monkeypatch):
    model = text("4.31.0")
    attention, decoder = type(model.model.layers[0].self_attn), type(model.model)
    stock = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, x, freqs: x)
    with pytest.raises(eras.MissingSeam, match=r"LlamaAttention.forward takes \(x, freqs\), which vkernels replaces"):
        eras.apply(model)
    monkeypatch.setattr(attention, "forward", stock)
    monkeypatch.setattr(decoder, "_prepare_decoder_attention_mask", lambda self, mask: mask)
    with pytest.raises(eras.MissingSeam, match=r"_prepare_decoder_attention_mask takes \(mask\)"):
        eras.apply(model)
    assert "forward" not in model.model.layers[0].self_attn.__dict__
    assert "left      mask: LlamaModel" in str(eras.apply(model, strict=False))


@pytest.mark.parametrize("version", ["4.31.0", "4.37.2"])
def test_a_layer_somebody_bound_before_keeps_its_dense_mask(version):
    model, inputs = text(version), padded()
    bound = model.model.layers[1].self_attn
    bound.forward = bound.forward
    report = eras.apply(model)
    assert report.verify(inputs, tolerance=1e-4).ok
    assert "attention: LlamaAttention: its forward is bound to the instance already" in str(report)
    assert "mask: LlamaModel: not every layer of it is replaced" in str(report)
    assert "1 on the stock path (a dense mask is given)" in str(report)


def test_autocast_hands_attention_one_dtype():
    model, inputs = text("4.45.2"), padded()
    eras.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs).logits
    eras.restore(model)
    torch.testing.assert_close(out[1].float(), model(**inputs).logits[1], rtol=0.1, atol=0.3)


def test_another_rotation_of_the_same_name_is_left_alone(monkeypatch):
    file = old_packages.transformers_of("4.31.0", "llama")["llama"]
    model, inputs = text("4.31.0"), padded()
    stock = file.apply_rotary_pos_emb
    monkeypatch.setattr(
        file, "apply_rotary_pos_emb", lambda q, k, cos, sin, position_ids: stock(q, k, cos, -sin, position_ids)
    )
    with pytest.raises(eras.MissingSeam, match="apply_rotary_pos_emb is another rotation"):
        eras.apply(model)
    report = eras.apply(model, strict=False)
    assert report.verify(inputs, tolerance=1e-4).ok
    assert report.calls == {"attention": 2, "mask": 1}


def test_models_of_today_are_sent_to_the_other_adapter():
    with pytest.raises(eras.MissingSeam, match="reads the registry of transformers 5"):
        eras.apply(zoo.build("LLaMA").model)


def test_the_causal_plan_of_the_functional_core():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    q, k = torch.randn(2, 2, 1, 8), torch.randn(2, 5, 1, 8)
    got = vk.attention(q, k, k, mask=eras.causal(2, 5, padding))
    seen = padding[:, None].bool() & (torch.arange(5) <= torch.tensor([[3], [4]]))
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), seen[:, None])
    close(got, want.transpose(1, 2))
    assert eras.causal(1, 5) is None
    with pytest.raises(ValueError, match="causal: queries must be at most the 5 keys, got 6"):
        eras.causal(6, 5)
    with pytest.raises(ValueError, match=r"causal: padding must have shape \(b 4\), got \(2, 5\)"):
        eras.causal(2, 4, padding)


def test_a_mask_is_read_once_for_all_layers_and_again_when_it_changes():
    padding = torch.tensor([[False, True, True]])
    read = masks.once(masks.of_padding, padding, 2, 3)
    assert masks.once(masks.of_padding, padding, 2, 3) is read
    assert masks.once(masks.of_padding, padding, 3, 3).shape == (1, 1, 3, 3)
    padding[0, 0] = True
    assert not masks.once(masks.of_padding, padding, 2, 3).padded
    with torch.inference_mode():
        assert masks.once(masks.of_padding, padding.clone(), 2, 3).shape == (1, 1, 2, 3)
    watched = weakref.ref(padding)
    del padding
    assert watched() is None


def test_doctor_reads_the_files_of_an_old_version(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", "4.31.0")
    for family, file in old_packages.transformers_of("4.31.0", "llama", "clip").items():
        monkeypatch.setitem(sys.modules, f"transformers.models.{family}.modeling_{family}", file)
    monkeypatch.setitem(sys.modules, "transformers.models.qwen2.modeling_qwen2", None)
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "LlamaAttention                             attention, rope" in text
    assert "LlamaModel                                 mask" in text
    assert "CLIPAttention                              attention" in text
    assert "qwen2              not in this version" in text
    monkeypatch.setattr(file.CLIPAttention, "forward", lambda self, x: x)
    assert doctor.main() == 1
    assert "MISSING CLIPAttention.forward takes (x)" in capsys.readouterr().out


@pytest.mark.parametrize("version", VERSIONS)
def test_every_attention_class_of_the_files_has_a_form(version):
    for file in old_packages.transformers_of(version, "llama", "clip").values():
        found = known.seams_of(file)
        assert len(found) >= 1
        assert [lost for _, _, lost in found if lost] == []
