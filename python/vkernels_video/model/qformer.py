"""The Q-Former: learned queries read a frame's tokens, with the question beside them (BLIP-2, InstructBLIP).

Its state has the keys of transformers' InstructBlipQFormerModel. It has no dropout: ST-LLM, its user, freezes it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkernels as vk
from vkernels_video.model.config import QFormerConfig


class Heads(nn.Module):
    """Biased projections and softmax attention of x to `source`."""

    def __init__(self, config: QFormerConfig, source: int):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source, config.width)
        self.value = nn.Linear(source, config.width)

    def forward(self, x: Tensor, source: Tensor, hidden: Tensor | None, mask: vk.VideoMask | None, impl: str) -> Tensor:
        """x [b s c], source [b s_k e]; `hidden` [b s_k] bool, True where a key is padding, `mask` says the same."""
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k, v = (proj(source).unflatten(-1, (self.heads, -1)) for proj in (self.key, self.value))
        if impl != "eager":
            out = vk.attention(q, k, v, mask=mask)
            assert isinstance(out, Tensor)
            return out.flatten(2)
        bias = None if hidden is None else hidden[:, None, None].to(q.dtype) * -10_000.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """LayerNorm(x + dense(y))."""

    def __init__(self, config: QFormerConfig, inner: int):
        super().__init__()
        self.dense = nn.Linear(inner, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.eps)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dense(y))


class Attention(nn.Module):
    def __init__(self, config: QFormerConfig, source: int):
        super().__init__()
        self.attention = Heads(config, source)
        self.output = AddNorm(config, config.width)

    def forward(self, x: Tensor, source: Tensor, hidden: Tensor | None, mask: vk.VideoMask | None, impl: str) -> Tensor:
        return self.output(self.attention(x, source, hidden, mask, impl), x)


class Widen(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Queries and text attend to each other; queries alone to the frame, in some layers; each has its own MLP."""

    def __init__(self, config: QFormerConfig, crosses: bool):
        super().__init__()
        self.attention = Attention(config, config.width)
        self.crossattention = Attention(config, config.source) if crosses else None
        self.intermediate_query, self.output_query = Widen(config), AddNorm(config, config.mlp)
        if config.vocab:
            self.intermediate, self.output = Widen(config), AddNorm(config, config.mlp)

    def forward(
        self, x: Tensor, queries: int, frame: Tensor, hidden: Tensor | None, mask: vk.VideoMask | None, impl: str
    ) -> Tensor:
        return self.after(self.attention(x, x, hidden, mask, impl), queries, frame, impl)

    def after(self, x: Tensor, queries: int, frame: Tensor, impl: str) -> Tensor:
        """What follows the attention of queries and text to each other."""
        asked = x[:, :queries]
        if self.crossattention is not None:
            asked = self.crossattention(asked, frame, None, None, impl)
        asked = self.output_query(self.intermediate_query(asked), asked)
        if x.shape[1] == queries:
            return asked
        text = x[:, queries:]
        return torch.cat([asked, self.output(self.intermediate(text), text)], dim=1)


class Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        if config.vocab:
            self.word_embeddings = nn.Embedding(config.vocab, config.width)
            self.position_embeddings = nn.Embedding(config.context, config.width)
        self.layernorm = nn.LayerNorm(config.width, config.eps)

    def forward(self, queries: Tensor, text: Tensor | None) -> Tensor:
        if text is None:
            return self.layernorm(queries)
        words = self.word_embeddings(text) + self.position_embeddings.weight[: text.shape[1]]
        return self.layernorm(torch.cat([queries, words], dim=1))


class Encoder(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i % config.cross_every == 0) for i in range(config.layers))


class QFormer(nn.Module):
    """Frames [p l e], and a question per frame or none -> `queries` tokens per frame [p queries c]."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, config.width))
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, frames: Tensor, text: Tensor | None, attention: Tensor | None, impl: str = "vkernels") -> Tensor:
        """text: token ids [b s] of one question per video, shared by its p / b frames; attention [b s] bool, False at
        padding. Everything before the first look at a frame is the same for all frames of a video."""
        config = self.config
        if text is not None and text.shape[1] > config.context:
            raise ValueError(f"QFormer: text must have at most {config.context} tokens, got {text.shape[1]}")
        videos = 1 if text is None else len(text)
        if len(frames) % videos:
            raise ValueError(f"QFormer: frames must be a multiple of the {videos} questions, got {len(frames)}")
        per = len(frames) // videos
        x = self.embeddings(self.query_tokens.expand(videos, -1, -1), text)
        shown = None if attention is None else F.pad(attention.bool(), (config.queries, 0), value=True)
        if impl == "eager":
            x = x.repeat_interleave(per, dim=0)
            hidden, mask = None if shown is None else ~shown.repeat_interleave(per, dim=0), None
            for layer in self.encoder.layer:
                x = layer(x, config.queries, frames, hidden, mask, impl)
            return x[:, : config.queries]
        once = every = None
        if shown is not None:
            joint = vk.VideoMask.joint(vk.Grid(1, 1, x.shape[1]))
            once, every = joint.keep(shown), joint.keep(shown.repeat_interleave(per, dim=0))
        first, *rest = cast(list[Layer], list(self.encoder.layer))
        x = first.attention(x, x, None, once, impl).repeat_interleave(len(frames) // len(x), dim=0)
        x = first.after(x, config.queries, frames, impl)
        for layer in rest:
            x = layer(x, config.queries, frames, None, every, impl)
        return x[:, : config.queries]
