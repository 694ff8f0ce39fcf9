"""Modeling files of 2023 to 2025, from their own wheels, stock against patched: LLaMA and CLIP of transformers 4.28,
4.31, 4.37, 4.45 and 4.48, Qwen2 of 4.45, LLaVA's flash-attention patch, BLIP-2's EVA ViT and Q-Former.

Planted, one at a time, and seen red: SEE BELOW
"""

import copy

import old_packages
import pytest
import torch

pytest.importorskip("transformers")
from vkernels_video.integrations import eras

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
