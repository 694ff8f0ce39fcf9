"""Video rows merged into embeddings by plan, against torch's masked_scatter. Whole models: test_hf_matrix.py.

Planted, one at a time, and seen red: features one row off; samples of a batch numbered apart; the count not looked
at; the stock path not counted.
"""

import pytest
import torch

pytest.importorskip("transformers")
from vkernels_video.integrations import transformers as vkt
from vkernels_video.integrations import zoo
from vkernels_video.integrations.transformers.merge import Placeholders, placeholders
from vkernels_video.integrations.transformers.seams import Seam


def seam():
    return Seam("merge", "Model", "stock", "ours")


@pytest.mark.parametrize("wide", [False, True])
def test_rows_go_where_masked_scatter_puts_them(wide):
    embeds, features = torch.randn(2, 6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1]]).bool()[..., None]
    mask = mask.expand_as(embeds) if wide else mask
    ours = seam()
    weight = torch.randn(2, 6, 5)
    found = []
    for marks in (mask, placeholders(mask, ours)):
        out = embeds.masked_scatter(marks, features)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (embeds, features))))
    for stock, got in zip(*found, strict=True):
        assert type(got) is torch.Tensor
        assert torch.equal(stock, got)
    assert (ours.calls, ours.stock_calls.total()) == (1, 0)


def test_a_flat_list_of_features_is_rows_in_order():
    embeds, mask, ours = torch.zeros(1, 4, 3), torch.tensor([0, 1, 0, 1]).bool()[None, :, None], seam()
    out = embeds.masked_scatter(placeholders(mask, ours), torch.arange(6.0))
    assert out.tolist() == [[[0, 0, 0], [0, 1, 2], [0, 0, 0], [3, 4, 5]]]
    assert ours.calls == 1


def test_what_is_no_merge_of_rows_stays_torchs():
    embeds, rows = torch.zeros(1, 4, 3), torch.tensor([0, 1, 0, 1]).bool()[None, :, None]
    cells = torch.rand(1, 4, 3) > 0.5
    for mask, features, why in (
        (rows, torch.ones(3, 3), "more features than placeholders"),
        (cells, torch.ones(4, 3), "does not mark rows"),
    ):
        ours = seam()
        assert torch.equal(
            embeds.masked_scatter(placeholders(mask, ours), features), embeds.masked_scatter(mask, features)
        )
        assert why in str(ours)
        assert ours.calls == 0
    with pytest.raises(RuntimeError):
        embeds.masked_scatter(placeholders(rows, seam()), torch.ones(1, 3))


def test_everything_else_sees_a_plain_tensor():
    mask = torch.tensor([[0, 1], [1, 1]]).bool()[..., None]
    marked = placeholders(mask, seam())
    assert isinstance(marked, Placeholders)
    for made in (marked[..., 0], marked | mask, marked.sum(), marked.to(torch.int32)):
        assert type(made) is torch.Tensor
    assert torch.equal(marked[..., 0], mask[..., 0])


def test_two_clips_and_text_of_other_lengths_in_one_batch():
    sample = zoo.build("Video-LLaVA")
    video, ids = sample.inputs["pixel_values_videos"], sample.inputs["input_ids"]
    mask = torch.ones(2, ids.shape[1] + 2, dtype=torch.long)
    mask[0, :2] = 0
    other = torch.cat([ids[:, :2], ids[:, :2], ids[:, 2:]], 1)
    both = torch.cat([torch.nn.functional.pad(ids, (2, 0)), other])
    inputs = dict(input_ids=both, attention_mask=mask, pixel_values_videos=torch.cat([video, -video]))
    report = vkt.apply(sample.model)
    assert report.verify(inputs).idle == ()
    assert report.calls["merge"] == 1
