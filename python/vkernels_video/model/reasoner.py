"""A language model as a reasoner over a stream of units: OPT's and GPT-2's blocks with learned positions, or T5's.

All positions at once for training, one unit at a time against a ring of keys and values for a live stream. Virtual
prompt embeddings and learned prefix keys and values are part of it. The keys of its state are OPT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkernels as vk
from vkernels_video.model import checkpoint, layouts
from vkernels_video.model.cache import FULL_PRECISION
from vkernels_video.model.config import ReasonerConfig, T5Config
from vkernels_video.model.published import refuse_other_reasoner
from vkernels_video.model.t5 import T5Layer, T5SelfAttention, bucket


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """Two softmaxes over different keys as one over both: outputs [b s n d], lse [b n s]."""
    share = torch.sigmoid(more_lse - lse).transpose(1, 2)[..., None]
    return out + (more - out) * share.to(out.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: ReasonerConfig):
        super().__init__()
        width = config.width
        self.heads, self.causal = config.heads, config.causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        shape = (2, 1, config.prefix, config.heads, width // config.heads)
        self.prefix = nn.Parameter(torch.randn(shape) * 0.02) if config.prefix else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v  # b s n d

    def with_prefix(self, q: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """The prefix is shared by the batch: read where it lies, never repeated or concatenated."""
        if self.prefix is not None:
            k, v = (each.expand(len(q), -1, -1, -1) for each in self.prefix)
            out = _merge(out, lse, *vk.attention(q, k, v, return_lse=True))
        return self.out_proj(out.flatten(2))

    def forward(self, x: Tensor, window: int | None, impl: str) -> Tensor:
        q, k, v = self.project(x)
        s = x.shape[1]
        if impl != "eager":
            mask = None
            if self.causal:
                mask = vk.VideoMask.frame_causal(vk.Grid(s, 1, 1), window)
            out, lse = vk.attention(q, k, v, mask=mask, return_lse=True)
            return self.with_prefix(q, out, lse)
        visible = torch.ones(s, s, dtype=torch.bool, device=x.device)
        if self.causal:
            visible = visible.tril() if window is None else visible.tril().triu(1 - window)
        return self.dense(q, k, v, visible)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Plain attention over everything `visible` [s_q s_k], the prefix repeated in front."""
        if self.prefix is not None:
            k, v = (torch.cat([p.expand(len(q), -1, -1, -1), x], 1) for p, x in zip(self.prefix, (k, v), strict=True))
            visible = F.pad(visible, (self.prefix.shape[2], 0), value=True)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: ReasonerConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.act = nn.ReLU() if config.activation == "relu" else nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor, window: int | None, impl: str) -> Tensor:
        return self.after(x, self.self_attn(self.self_attn_layer_norm(x), window, impl))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.fc2(self.act(self.fc1(self.final_layer_norm(x))))


class Reasoner(nn.Module):
    """Embeddings [b s c] -> final states [b s c]."""

    def __init__(self, config: ReasonerConfig | T5Config):
        super().__init__()
        self.config = config
        width, layers = config.width, range(config.layers)
        self.embed_tokens = nn.Embedding(config.vocab, width)
        if isinstance(config, T5Config):
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)
            self.layers = nn.ModuleList(T5Layer(config, self.bias) for _ in layers)
            self.final_layer_norm: nn.Module = nn.RMSNorm(width, config.eps)
        else:
            self.embed_positions = nn.Embedding(config.context + config.position_offset, width)
            self.layers = nn.ModuleList(Layer(config) for _ in layers)
            self.final_layer_norm = nn.LayerNorm(width, config.eps)
        self.prompt = nn.Parameter(torch.randn(1, config.prompt, width) * 0.02) if config.prompt else None

    def positions(self, start: int, count: int) -> Tensor | float:
        """What is added to `count` tokens from `start` on; nothing for T5."""
        config = self.config
        if isinstance(config, T5Config):
            return 0.0
        if start + count > config.context:
            raise ValueError(f"Reasoner: tokens must fit the {config.context} positions, got {start + count}")
        first = start + config.position_offset
        return self.embed_positions.weight[first : first + count]

    def bias(self, s_q: int, s_k: int) -> Tensor:
        """T5's bias [n s_q s_k] on the scores of the last s_q of s_k tokens."""
        config = self.config
        assert isinstance(config, T5Config)
        places = torch.arange(s_k, device=self.relative_attention_bias.weight.device)
        distance = places - places[s_k - s_q :, None]
        rows = bucket(distance, config.causal, config.buckets, config.distance)
        return self.relative_attention_bias(rows).permute(2, 0, 1)

    def load(self, *paths: str | Path) -> list[str]:
        """Weights of an OPT, GPT-2 or T5 checkpoint of this size. Returns the names of what stays as initialised, which
        may only be a virtual prompt or prefix; CheckpointError names everything else that does not fit."""
        config = self.config
        state: checkpoint.State = {}
        for path in map(Path, paths):
            refuse_other_reasoner(config, path)
            state |= checkpoint.read(path)
        source = checkpoint.recognise(state, layouts.REASONERS)
        own = "T5" if isinstance(config, T5Config) else "OPT" if config.position_offset else "GPT-2"
        if source.name != own:
            raise checkpoint.CheckpointError(
                f"checkpoint: this reasoner's weights must be {own}'s, got {source.name}'s"
            )
        if isinstance(config, T5Config):
            source = layouts.t5(decoder=config.causal)
        made, _ = checkpoint.translate(state, source)
        return checkpoint.load(self, made, source.name, (r"^prompt$", r"\.prefix$"))

    def forward(self, x: Tensor, impl: str = "vkernels", window: int | None = None) -> Tensor:
        """`window`: a token sees itself and the window - 1 before it."""
        virtual = 0 if self.prompt is None else self.prompt.shape[1]
        if self.prompt is not None:
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(0, x.shape[1])
        for layer in self.layers:
            x = layer(x, window, impl)
        return self.final_layer_norm(x)[:, virtual:]


class Stream:
    """A reasoner fed unit by unit. Each step costs one unit against what the window holds.

    With a window, keys and values live in a ring that never moves ("vkernels"), or are cut and copied each step.
    """

    def __init__(self, reasoner: Reasoner, b: int = 1, window: int | None = None, impl: str = "vkernels"):
        config = reasoner.config
        if not config.causal:
            raise ValueError("Stream: the reasoner must be causal, got causal=False")
        if window is not None and window < 1:
            raise ValueError(f"Stream: window must be at least 1, got {window}")
        if isinstance(config, T5Config):
            impl = "eager"  # its bias is in no kernel
        self.reasoner, self.window, self.impl, self.seen = reasoner, window, impl, 0
        weight = reasoner.embed_tokens.weight
        self.caches: list = [None] * config.layers
        if impl != "eager" and isinstance(config, ReasonerConfig):
            scheme, m, d = FULL_PRECISION[weight.dtype], config.heads, config.width // config.heads
            capacity, ring = window or config.context, window is not None
            self.caches = [
                vk.KVCache(scheme, b=b, m=m, d=d, capacity=capacity, ring=ring, device=weight.device)
                for _ in range(config.layers)
            ]
        if reasoner.prompt is not None:
            for i in range(config.prompt):
                self.step(reasoner.prompt[:, i : i + 1].expand(b, -1, -1))

    @torch.inference_mode()
    def step(self, unit: Tensor) -> Tensor:
        """One embedded unit [b 1 c] -> its final state [b 1 c]."""
        if unit.dim() != 3 or unit.shape[1] != 1:
            raise ValueError(f"Stream.step: unit must have shape (b 1 c), got {tuple(unit.shape)}")
        x = unit + self.reasoner.positions(self.seen, 1)
        self.seen += 1
        for i, layer in enumerate(cast("list[Layer | T5Layer]", list(self.reasoner.layers))):
            x = layer.after(x, self._attend(i, layer.self_attn, layer.self_attn_layer_norm(x)))
        return self.reasoner.final_layer_norm(x)

    def _attend(self, i: int, attention: SelfAttention | T5SelfAttention, x: Tensor) -> Tensor:
        q, k, v = attention.project(x)
        if self.impl != "eager" and isinstance(attention, SelfAttention):
            out, lse = vk.decode_attention(q, self.caches[i].append(k, v), return_lse=True)
            return attention.with_prefix(q, out, lse)
        if self.caches[i] is not None:
            k, v = torch.cat([self.caches[i][0], k], dim=1), torch.cat([self.caches[i][1], v], dim=1)
        if self.window is not None:
            k, v = k[:, -self.window :], v[:, -self.window :]
        self.caches[i] = k, v
        return attention.dense(q, k, v, torch.ones(1, k.shape[1], dtype=torch.bool, device=x.device))
