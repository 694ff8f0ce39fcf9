"""Every host architecture, tiny: forward, backward and generate the same with and without vkernels, and the table that
says so is current.

Planted, one at a time, and seen red: scores scaled by another factor; keys and values swapped; heads of a group taken
in the wrong order; the rotation reversed; the window gather left out; the pooling of another stride; time and space
swapped in the divided block; V-JEPA2's odd members turned by the even ones' angle; a mask dropped; a vision block
without its residual, with the other norm's weight, with another eps; VideoLLaMA3's grid taken for a raster; the
channels of a pixel shuffle in the other order; a plain key for a packed tower; TimeSformer's patches shifted, and its
second projection without its bias, with the other norm, without its residual.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
from vkernels_video.integrations import matrix, zoo
from vkernels_video.integrations import transformers as vkt

CALLS = {
    "Qwen2-VL": "8 → 4",
    "Qwen2.5-VL": "59 → 6",
    "Qwen3-VL": "8 → 5",
    "VideoLLaMA3": "8 → 4",
    "TimeSformer": "4 → 4",
}


@pytest.fixture(scope="module")
def rows():
    return {}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_forward_backward_and_generate_are_the_same(name, rows):
    row = rows[name] = matrix.measure(name)
    assert row.forward < 5e-6, row
    assert row.backward < 2e-4, row
    assert row.same_tokens is not False, row
    before, after = row.calls.split(" → ")
    assert row.calls == CALLS.get(name, row.calls)
    assert int(after) <= int(before)


def test_the_table_of_the_documentation_is_current(rows):
    measured = [rows.get(name) or matrix.measure(name) for name in zoo.ZOO]
    text = matrix.DOCUMENT.read_text()
    assert matrix.stale(text, measured) is None
    worse = [dataclasses.replace(row, forward=1.0) for row in measured]
    assert "differs by" in matrix.stale(text, worse)
    other = [dataclasses.replace(row, seams="nothing") for row in measured]
    assert "the table says" in matrix.stale(text, other)
    assert "in the zoo" in matrix.stale(text, measured[1:])
    assert "no table" in matrix.stale("", measured)


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
    vkt.apply(sample.model)
    ours = vkt.report.run_once(sample.model, low)
    theirs = max(vkt.report.compare(exact, stock, inputs).values())
    mine = max(vkt.report.compare(exact, ours, inputs).values())
    assert mine <= 2 * theirs + torch.finfo(dtype).eps, (mine, theirs)
