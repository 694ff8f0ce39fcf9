"""The MLPs of vision towers, a slice of tokens at a time: the same rows, less memory, and stock where slices cannot be.

Planted and seen red: a slice left out, the last rows of another slice, slices while gradients are wanted, dropout drawn
by slices, the shape of the tokens lost.
"""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP
from vkernels_video.integrations import transformers as vkt
from vkernels_video.integrations.transformers import mlp


@pytest.fixture
def patched():
    torch.manual_seed(0)
    part = CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=96)).eval()
    return part, vkt.apply(part)


@pytest.mark.parametrize("shape", [(1, 24), (mlp.ROWS, 24), (mlp.ROWS + 1, 24), (3, 5, 333, 24), (0, 24)])
def test_every_row_is_that_of_the_whole(patched, shape):
    part, report = patched
    x = torch.randn(shape)
    with torch.no_grad():
        got, want = part(x), CLIPMLP.forward(part, x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert report.calls == {"mlp": 1}


def test_hidden_rows_of_all_tokens_never_exist(patched):
    part, _ = patched
    seen = []
    part.fc1.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        part(torch.randn(2500, 24))
    assert seen == [1024, 1024, 452]


def test_what_cannot_be_sliced_is_stock_and_says_so(patched):
    part, report = patched
    x = torch.randn(1, 2500, 24, requires_grad=True)
    (dx,) = torch.autograd.grad(part(x).sum(), x)
    (want,) = torch.autograd.grad(CLIPMLP.forward(part, x).sum(), x)
    assert torch.equal(dx, want)
    part.train()
    with torch.no_grad():
        part(hidden_states=x)
    assert report.calls == {"mlp": 0}
    text = str(report)
    assert "1 on the stock path (a gradient would keep the hidden rows of all slices)" in text
    assert "1 on the stock path (dropout is drawn for all tokens at once)" in text
