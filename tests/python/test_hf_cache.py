"""generate on a cache of codes: what it computes, for whom, and what it leaves to others.

Planted, one at a time, and seen red: a prompt's padding kept in the cache; the first step attending to the prompt only;
a sequence's pads taken from another; a window ignored; the codes not reordered with the beams.
"""

import pytest
import torch

pytest.importorskip("transformers")
from vkernels_video.integrations import transformers as vkt
from vkernels_video.integrations import zoo
from vkernels_video.integrations.transformers.cache import left_pads

PROMPT, NEW = 300, 6  # longer than the window of full precision: codes are read


@pytest.fixture
def prompt():
    source = torch.Generator().manual_seed(0)
    return torch.randint(3, 80, (2, PROMPT), generator=source)


def steps(model, ids, mask, **more):
    """Logits of every step when the model is made to say the same tokens."""
    tokens = torch.arange(5, 5 + NEW)

    def say(batch, seen):
        return [int(tokens[min(len(seen) - PROMPT, NEW - 1)])]

    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=say,
        pad_token_id=0,
        **more,
    )
    return torch.stack(out.logits), out.past_key_values


@pytest.mark.parametrize("name", ["LLaMA", "Qwen2 (sliding window)", "Qwen3"])
@pytest.mark.parametrize(("scheme", "error"), [("int8", 0.02), ("int4", 0.3)])
def test_every_step_attends_on_codes(name, scheme, error, prompt):
    model = zoo.build(name).model
    mask = torch.ones_like(prompt)
    mask[0, :37] = 0
    want, _ = steps(model, prompt, mask)
    report = vkt.apply(model, cache=scheme)
    got, cache = steps(model, prompt, mask)
    codes = cache.layers[0].codes
    assert (codes.scheme, codes.length(0), codes.length(1)) == (scheme, PROMPT - 37 + NEW - 1, PROMPT + NEW - 1)
    assert report.calls["cache"] == 2 * (NEW - 1)
    assert (got[0] - want[0]).abs().max() < 1e-4  # the prompt sees itself in full precision
    worst = ((got - want).abs().amax((1, 2)) / want.abs().amax((1, 2))).max()
    assert 0 < worst < error


def test_padding_changes_nothing(prompt):
    """A padded sequence gives the logits of the sequence alone."""
    model = zoo.build("LLaMA").model
    vkt.apply(model, cache="int4")
    mask = torch.ones_like(prompt)
    mask[0, :20] = 0
    both, _ = steps(model, prompt, mask)
    shorter = prompt[:1, 20:]
    tokens = torch.arange(5, 5 + NEW)
    alone = model.generate(
        shorter,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda batch, seen: [int(tokens[min(len(seen) - PROMPT + 20, NEW - 1)])],
    )
    torch.testing.assert_close(both[:, 0], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=1e-4)


def test_beams_take_their_codes_along(prompt):
    """At 8 bits the beams choose what they choose with a full cache."""
    model = zoo.build("LLaMA").model
    call = dict(max_new_tokens=NEW, num_beams=3, do_sample=False, pad_token_id=0)
    want = model.generate(prompt, **call)
    vkt.apply(model, cache="int8")
    assert torch.equal(model.generate(prompt, **call), want)


def test_sequences_are_reordered_with_their_codes(prompt):
    model = zoo.build("LLaMA").model
    vkt.apply(model, cache="int4")
    _, cache = steps(model, prompt, None)
    before = [layer.codes.dequantised() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        after = layer.codes.dequantised()
        assert torch.equal(after[0], k[[1, 1]])
        assert torch.equal(after[1], v[[1, 1]])


def test_masks_with_holes_are_attended_dequantised_and_counted(prompt):
    model = zoo.build("LLaMA").model
    mask = torch.ones_like(prompt)
    mask[0, 7:13] = 0
    want, _ = steps(model, prompt, mask)
    report = vkt.apply(model, cache="int8")
    got, _ = steps(model, prompt, mask)
    assert ((got - want).abs().max() / want.abs().max()) < 0.02
    assert "dequantised for a chunk of a prompt or a mask with holes" in str(report)


def test_a_prompt_in_chunks(prompt):
    model = zoo.build("LLaMA").model
    want, _ = steps(model, prompt, None)
    vkt.apply(model, cache="int8")
    got, _ = steps(model, prompt, None, prefill_chunk_size=100)
    assert ((got - want).abs().max() / want.abs().max()) < 0.02
    mask = torch.ones_like(prompt)
    mask[0, :20] = 0
    got, _ = steps(model, prompt, mask)
    assert torch.isfinite(got).all()


def test_a_cache_the_caller_chose_stays(prompt):
    model = zoo.build("LLaMA").model
    report = vkt.apply(model, cache="int4")
    _, cache = steps(model, prompt, None, cache_implementation="static")
    assert type(cache).__name__ == "StaticCache"
    model.generate(prompt, max_new_tokens=2, use_cache=False, do_sample=False)
    assert report.calls["cache"] == 0
    assert "2 on the stock path (generate has another cache" in str(report)


def test_tokens_are_not_taken_back(prompt):
    model = zoo.build("LLaMA").model
    vkt.apply(model, cache="int4")
    _, cache = steps(model, prompt, None)
    with pytest.raises(NotImplementedError, match="cache: generate must not take tokens back from codes"):
        cache.layers[0].crop(-1)
    cache.layers[0].reset()
    assert cache.get_seq_length() == 0


def test_left_pads():
    assert left_pads(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2, 3) == [2, 0]
    assert left_pads(torch.tensor([[0, 0, 1], [1, 1, 1]]), 4, 3) == [2, 2, 0, 0]
    for mask in (None, torch.ones(2, 3), torch.tensor([[0, 1, 0], [1, 1, 1]]), torch.ones(2, 4), torch.ones(3, 3)):
        assert left_pads(mask, 2, 3) is None
