"""Every host architecture, tiny: forward, backward and generate the same with and without vkernels.

Planted, one at a time, and seen red: scores scaled by another factor; keys and values swapped; heads of a group taken
in the wrong order; the rotation reversed; the window gather left out; the pooling of another stride; time and space
swapped in the divided block; V-JEPA2's odd members turned by the even ones' angle; a mask dropped.
"""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
from vkernels_video.integrations import transformers as vkt
from vkernels_video.integrations import zoo

VARLEN = {"Qwen2-VL": (8, 4), "Qwen2.5-VL": (59, 6), "Qwen3-VL": (5, 5), "VideoLLaMA3": (8, 4), "TimeSformer": (4, 2)}


def gradients(sample, inputs):
    """Loss gradients of every parameter that has one, by name."""
    sample.model.zero_grad(set_to_none=True)
    out = sample.model(**inputs)
    main = out.logits if "logits" in out else out.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == main.shape[:2]:
        main = main[mask.bool()]
    weights = torch.linspace(-1, 1, main.numel()).view_as(main)
    (main * weights).mean().backward()
    return {name: p.grad.clone() for name, p in sample.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_forward_backward_and_generate_are_the_same(name):
    sample = zoo.build(name)
    report = vkt.apply(sample.model)
    made = report.verify(sample.inputs)
    assert made.largest < 2e-5, made
    assert not made.idle, made
    assert made.calls_after <= made.calls_before
    assert (made.calls_before, made.calls_after) == VARLEN.get(name, (made.calls_before, made.calls_before))

    got = gradients(sample, sample.inputs)
    with report.suspended():
        want = gradients(sample, sample.inputs)
    assert got.keys() == want.keys()
    assert got
    floor = 1e-3 * max(gradient.abs().max() for gradient in want.values())  # a bias of keys has gradient 0
    for parameter, gradient in want.items():
        scale = gradient.abs().max().clamp_min(floor)
        assert (got[parameter] - gradient).abs().max() <= 2e-4 * scale, parameter

    if sample.generates:
        arguments = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        tokens = sample.model.generate(**sample.inputs, **arguments)
        with report.suspended():
            assert torch.equal(tokens, sample.model.generate(**sample.inputs, **arguments))
    assert not any(seam.stock_calls for seam in report.seams), report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LLaMA", "Qwen2.5-VL", "LLaVA-OneVision", "TimeSformer", "V-JEPA2"])
def test_half_precision_is_as_close_as_it_can_be(name, dtype):
    """Against stock in float32 the error is at most twice that of stock in the same dtype."""
    sample = zoo.build(name)
    inputs = {k: x.to(dtype).float() if x.is_floating_point() else x for k, x in sample.inputs.items()}
    sample.model.to(dtype).float()
    exact = vkt.report.run_once(sample.model, inputs)
    sample.model.to(dtype)
    low = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    stock = vkt.report.run_once(sample.model, low)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = vkt.apply(sample.model)
        ours = vkt.report.run_once(sample.model, low)
    assert report.calls
    theirs = max(vkt.report.compare(exact, stock, inputs).values())
    mine = max(vkt.report.compare(exact, ours, inputs).values())
    assert mine <= 2 * theirs + torch.finfo(dtype).eps, (mine, theirs)
