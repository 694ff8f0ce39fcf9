"""A batch of texts with video rows in their middle, as the decoder's input: padded rows, or one packed row.

The padded form is what the papers' code builds, sample by sample; the packed form is one pass and holds no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vkernels as vk
from vkernels.rearrangement import RearrangePlan, gather


@dataclass(frozen=True)
class Example:
    """Token ids around the video: `before` it, `after` it, and the `answer`, which alone is learned."""

    before: Sequence[int]
    after: Sequence[int]
    answer: Sequence[int]

    @property
    def text(self) -> list[int]:
        return [*self.before, *self.after, *self.answer]


@dataclass(frozen=True)
class Laid:
    """Where everything of a batch stands. Rows are numbered over the samples laid end to end, `width` apart."""

    lengths: list[int]
    width: int  # rows of the whole
    video: Tensor  # rows [b k] of the video tokens
    positions: Tensor  # of every row
    predicting: Tensor  # rows whose next token belongs to an answer
    targets: Tensor  # those tokens


def lay(examples: Sequence[Example], video: int, *, packed: bool, keep: Tensor | None = None, uncut: int = 0) -> Laid:
    """`video` rows per sample. Positions count on over the rows that are there, as in ST-LLM's code; with `keep`
    [b video] given they are those of the uncut video of `uncut` rows."""
    lengths = [len(example.text) + video for example in examples]
    longest = max(lengths, default=0)
    starts = [sum(lengths[:i]) if packed else i * longest for i in range(len(examples))]
    width = sum(lengths) if packed else longest * len(examples)
    rows, predicting, targets = [], [], []
    positions = torch.zeros(width, dtype=torch.int64)
    for i, (example, start, length) in enumerate(zip(examples, starts, lengths, strict=True)):
        first, last = len(example.before), len(example.before) + video
        own = torch.arange(length)
        if keep is not None:
            own[first:last] = first + keep[i]
            own[last:] += uncut - video
        positions[start : start + length] = own
        rows.append(start + first + torch.arange(video))
        predicting.append(start + length - len(example.answer) - 1 + torch.arange(len(example.answer)))
        targets.append(torch.tensor(example.answer, dtype=torch.int64))
    return Laid(lengths, width, torch.stack(rows), positions, torch.cat(predicting), torch.cat(targets))


def packed_plan(examples: Sequence[Example], laid: Laid, n: int, keep: Tensor | None) -> RearrangePlan:
    """Sources (text rows of all samples) and (b n video rows), of which sample i keeps `keep[i]` -> the packed row."""
    b = len(examples)
    kept = torch.arange(n).expand(b, -1) if keep is None else keep
    total_text = sum(len(example.text) for example in examples)
    index = torch.full((laid.width,), -1, dtype=torch.int64)
    index[laid.video.flatten()] = (total_text + n * torch.arange(b)[:, None] + kept).flatten()
    index[index < 0] = torch.arange(total_text)
    return gather("pack_video", index, (total_text, b * n))


def inputs(
    examples: Sequence[Example], video: Tensor, keep: Tensor | None, embed: nn.Embedding, impl: str, laid: Laid
) -> Tensor:
    """Embeddings of a batch: [b s c] padded with zeros ("eager"), or [1 total c] ("vkernels"). video [b n c]."""
    text = [torch.tensor(example.text, dtype=torch.int64, device=video.device) for example in examples]
    if impl != "eager":
        plan = packed_plan(examples, laid, video.shape[1], keep)
        out = vk.rearrange([embed(torch.cat(text))[None], video.flatten(0, 1)[None]], plan)
        assert isinstance(out, Tensor)
        return out
    if keep is not None:
        dropped = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device).scatter_(1, keep, False)
        video = video[~dropped].view(len(video), -1, video.shape[-1])
    rows = []
    for example, ids, own in zip(examples, text, video, strict=True):
        words, split = embed(ids), len(example.before)
        rows.append(torch.cat([words[:split], own, words[split:]]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
