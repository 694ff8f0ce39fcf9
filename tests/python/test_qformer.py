"""The Q-Former: transformers' own, fed the same weights, is the witness."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel
from vkernels_video.model.config import QFormerConfig
from vkernels_video.model.qformer import QFormer

CONFIG = QFormerConfig(source=48, width=32, heads=4, layers=3, mlp=64, queries=5, vocab=50, context=16)


def pair() -> tuple[QFormer, InstructBlipQFormerModel]:
    theirs = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=16, cross_attention_frequency=2, encoder_hidden_size=48,
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    ours = QFormer(CONFIG).eval()
    with torch.no_grad():
        ours.query_tokens.normal_(generator=generator)
    found = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert found.missing_keys == ["query_tokens"]
    assert found.unexpected_keys in ([], ["embeddings.position_ids"])
    return ours, theirs


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_it_is_transformers_qformer(impl):
    ours, theirs = pair()
    frames = torch.randn(6, 7, 48)  # two videos of three frames
    text = torch.randint(0, 50, (2, 9))
    shown = torch.arange(9) < torch.tensor([[9], [4]])
    per_frame = torch.cat([torch.ones(6, 5), shown.repeat_interleave(3, 0)], dim=1).long()
    expected = theirs(
        input_ids=text.repeat_interleave(3, 0), attention_mask=per_frame,
        query_embeds=ours.query_tokens.expand(6, -1, -1), encoder_hidden_states=frames,
    ).last_hidden_state[:, :5]  # fmt: skip
    torch.testing.assert_close(ours(frames, text, shown, impl), expected, rtol=1e-4, atol=1e-5)


def test_gradients_agree():
    ours, _ = pair()
    frames = torch.randn(4, 7, 48)
    text, shown = torch.randint(0, 50, (2, 6)), torch.arange(6) < torch.tensor([[6], [3]])
    sides = []
    for impl in ("eager", "vkernels"):
        x = frames.clone().requires_grad_()
        ours.zero_grad()
        ours(x, text, shown, impl).square().sum().backward()
        sides.append([x.grad, *(p.grad for p in ours.parameters() if p.grad is not None)])
    largest = max(float(g.norm()) for g in sides[0])
    for fast, eager in zip(sides[1], sides[0], strict=True):
        assert (fast - eager).norm() <= 1e-4 * eager.norm() + 1e-6 * largest


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_without_text_all_frames_share_the_queries(impl):
    ours, _ = pair()
    frames = torch.randn(3, 7, 48)
    one = torch.cat([ours(frame[None], None, None, impl) for frame in frames])
    torch.testing.assert_close(ours(frames, None, None, impl), one, rtol=1e-4, atol=1e-5)


def test_refusals():
    ours, _ = pair()
    with pytest.raises(ValueError, match="QFormer: text must have at most 16 tokens, got 17"):
        ours(torch.zeros(1, 7, 48), torch.zeros(1, 17, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="QFormer: frames must be a multiple of the 2 questions, got 3"):
        ours(torch.zeros(3, 7, 48), torch.zeros(2, 4, dtype=torch.int64), None)
