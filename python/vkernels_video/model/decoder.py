"""The decoder: LLaMA's layers, written twice over one set of weights.

`_eager` runs on what a user of transformers runs today: its rotary embedding, its mask builder, SDPA, and a cache that
dequantises. `_vkernels` runs the same layers on the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

import vkernels as vk
from vkernels.check import require
from vkernels_video.model.cache import RowCache
from vkernels_video.model.clip import by_rows, plus, spared
from vkernels_video.model.config import DecoderConfig
from vkernels_video.model.mesh import Place

# Of one layer, q [b s n d], k and v [b s m d], and a cache or None -> [b s n d].
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Prompt:
    """Where the text and the frames stand in a prompt: `before` text tokens, frames x tokens, `after` text tokens."""

    before: int
    frames: int
    tokens: int  # per frame
    after: int

    @property
    def length(self) -> int:
        return self.before + self.frames * self.tokens + self.after

    def blocks(self) -> Tensor:
        """transformers' block_sequence_ids [1 s]: the frame of every token, -1 for text."""
        frames = torch.arange(self.frames).repeat_interleave(self.tokens)
        return F.pad(frames, (self.before, self.after), value=-1)[None]

    def mask(self, frame_attention: str) -> vk.VideoMask:
        """Causal, and inside a frame everybody sees everybody when `frame_attention` is "bidirectional"."""
        if frame_attention == "causal":
            return vk.VideoMask.causal(self.length)
        spans: list[vk.Text | vk.Video] = [
            vk.Text(self.before),
            vk.Video(self.frames, 1, self.tokens),
            vk.Text(self.after),
        ]
        return vk.VideoMask.spans(spans, within="frame")

    def visible_pairs(self, frame_attention: str) -> int:
        """How many (query, key) pairs `mask` lets through."""
        later_in_frame = self.frames * self.tokens * (self.tokens - 1) // 2
        causal = self.length * (self.length + 1) // 2
        return causal if frame_attention == "causal" else causal + later_in_frame


@dataclass(frozen=True)
class Rotary:
    """Rotary frequencies: of a base, and for "linear" and "yarn" scaled from `context` positions to `factor` times."""

    base: float
    kind: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    context: int = 0

    @classmethod
    def scaled(cls, config: DecoderConfig, length: int) -> Rotary:
        """For prompts of `length`, as the config scales them (arXiv:2409.12963, Eq. 3.5 and 3.6), s = length / context
        or the config's factor a:

        linear: positions / s.  ntk: base b s^(d / (d - 2)).  dynamic: the same of s = a length / context - a + 1, where
        a = 1 by default.  yarn: pairs that turn often keep their speed, slow ones are linear.
        """
        d, longer = config.head, length / config.context
        s = max(longer, 1.0) if config.rope_factor is None else config.rope_factor
        if config.rope_scaling == "dynamic":
            a = config.rope_factor or 1.0
            s = max(a * longer - a + 1, 1.0)
        if config.rope_scaling == "none" or s == 1.0:
            return cls(config.rope_theta)
        if config.rope_scaling in ("ntk", "dynamic"):
            return cls(config.rope_theta * s ** (d / (d - 2)))
        return cls(config.rope_theta, cast(Any, config.rope_scaling), s, config.context)

    def spec(self, d: int) -> vk.RopeSpec:
        more: dict[str, Any] = {"linear": {"factor": self.factor}, "default": {}}.get(
            self.kind, {"factor": self.factor, "original": self.context}
        )
        return vk.RopeSpec.build(d, self.base, self.kind, **more)

    def parameters(self) -> dict[str, Any]:
        """transformers' rope_parameters."""
        made: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.base}
        if self.kind != "default":
            made |= {"factor": self.factor, "original_max_position_embeddings": self.context}
        return made


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.head = config.head
        kv_width = config.kv_heads * self.head
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotary: Any, mask: Any, cache: Any, impl: str) -> Tensor:
        """x [b s c]; `rotary`, `mask` (for "vkernels" an `Attend`) and `cache` as the implementation wants them."""
        attend = self._eager if impl == "eager" else self._vkernels
        return self.o_proj(attend(x, rotary, mask, cache))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x).view(*x.shape[:2], -1, self.head) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v  # b s n d, b s m d

    def _eager(self, x: Tensor, rotary: tuple[Tensor, Tensor], masks: Any, caches: list[RowCache] | None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self._heads(x))  # b n s d
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        if caches is None:
            return self._attend(q, k, v, masks).reshape(x.shape)
        if masks is None:  # one new token of every sequence
            rows, masks, axis = [t.split(1) for t in (q, k, v)], [None] * len(x), 0
        else:  # prompts, one after the other
            lengths, masks = zip(*masks, strict=True)
            rows, axis = [t.split(lengths, dim=2) for t in (q, k, v)], 1
        outs = []
        for q, k, v, mask, cache in zip(*rows, masks, caches, strict=True):
            k, v = cache.update(k, v)
            outs.append(self._attend(q, k, v, mask))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=axis)
        return out.reshape(x.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = self.config.heads // self.config.kv_heads
        causal = mask is None and q.shape[2] > 1
        if groups > 1 and mask is not None:  # transformers repeats the heads whenever there is a mask
            k, v, groups = repeat_kv(k, groups), repeat_kv(v, groups), 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
        return out.transpose(1, 2)  # b s n d

    def _vkernels(
        self, x: Tensor, rotary: tuple[vk.RopeSpec, Tensor], attend: Attend, cache: vk.KVCache | None
    ) -> Tensor:
        q, k, v = self._heads(x)
        spec, positions = rotary
        q, k = vk.apply_rope(q, k, spec, positions, angle="hf_fp32", inplace=not torch.is_grad_enabled())
        return attend(q, k, v, cache).flatten(2)


class DecoderLayer(nn.Module):
    """The keys of its state are those of transformers' LlamaDecoderLayer."""

    def __init__(self, config: DecoderConfig, llama: LlamaConfig):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.width, config.eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.width, config.eps)
        self.mlp = LlamaMLP(llama)

    def forward(self, x: Tensor, rotary: Any, mask: Any, cache: Any, impl: str) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, cache, impl)
        mlp = self.mlp
        if impl == "eager" or not spared(mlp.down_proj):
            x = x + attended
            return x + mlp(self.post_attention_layernorm(x))

        def inner(rows: Tensor) -> Tensor:
            return F.silu(mlp.gate_proj(rows), inplace=True).mul_(mlp.up_proj(rows))

        x = plus(attended, x)
        return by_rows(x, self.post_attention_layernorm(x), inner, mlp.down_proj)


class Decoder(nn.Module):
    """Embeddings [b s c] -> logits of the last position [b vocab]."""

    def __init__(self, config: DecoderConfig, place: Place | None = None):
        super().__init__()
        self.config = config
        self.place = place or Place()
        self.llama = LlamaConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            num_hidden_layers=config.layers,
            vocab_size=config.vocab,
            max_position_embeddings=config.context,
            rms_norm_eps=config.eps,
        )
        self.llama._attn_implementation = "sdpa"
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, self.llama) for _ in range(config.layers))
        self.norm = LlamaRMSNorm(config.width, config.eps)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)

    def forward(
        self,
        x: Tensor,
        starts: Sequence[int],
        rotary: Rotary,
        caches: list[Any],
        prompts: list[Prompt] | None,
        impl: str,
    ) -> Tensor:
        """Logits [b vocab] after the last token of every sequence.

        prompts: a prefill of these, x [1 total c] with one after the other. None: one more token each, x [b 1 c], at
        positions `starts`. A cache of a layer is a `RowCache` per sequence ("eager") or one `vkernels.KVCache`.
        """
        if prompts is None:
            positions = torch.tensor(starts, device=x.device)[:, None]
            attend = None if impl == "eager" else partial(self.place.step, positions=starts)
            states = self._layers(x, positions, rotary, attend, caches, impl)[:, -1]
        else:
            lengths = [prompt.length for prompt in prompts]
            positions = torch.cat([torch.arange(length, device=x.device) for length in lengths])
            last = torch.tensor(lengths, device=x.device).cumsum(0) - 1
            if impl == "eager":
                masks = [(prompt.length, self._dense_mask(x, prompt)) for prompt in prompts]
                states = self._layers(x, positions, rotary, masks, caches, impl)[0, last]
            else:
                deal = self.deal(prompts)
                states = self.place.rows(self._dealt(x, positions, rotary, deal, lengths, caches), last, deal)
        return self.lm_head(self.norm(states))

    def deal(self, prompts: Sequence[Prompt]) -> Any:
        """Who has which tokens of these prompts."""
        every = [prompt.mask(self.config.frame_attention) for prompt in prompts]
        return self.place.deal(every[0] if len(every) == 1 else vk.VideoMask.pack(every))

    def hidden(
        self, x: Tensor, positions: Tensor, lengths: list[int], impl: str, rotary: Rotary | None = None
    ) -> Tensor:
        """Normalised states of causal sequences, with gradients and without a cache; `rotary` None is unscaled.

        "eager": padded rows x [b s c] and positions [b s]. "vkernels": one after the other, x [1 total c] and positions
        [total]; where ranks share the tokens, the states are this rank's, and `rows` has any of them.
        """
        rotary, caches = rotary or Rotary(self.config.rope_theta), [None] * len(self.layers)
        if impl == "eager":
            shown = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
            mask = create_causal_mask(self.llama, x, shown.to(x.device), None)
            return self.norm(self._layers(x, positions, rotary, mask, caches, impl))
        return self.norm(self._dealt(x, positions, rotary, self._causal(lengths), lengths, caches))

    def rows(self, h: Tensor, rows: Tensor, lengths: list[int], impl: str) -> Tensor:
        """Rows [k c], counted over the whole batch, of the states h that `hidden` gave."""
        return h.flatten(0, 1)[rows] if impl == "eager" else self.place.rows(h, rows, self._causal(lengths))

    def _causal(self, lengths: list[int]) -> Any:
        return self.place.deal(vk.VideoMask.pack([vk.VideoMask.causal(length) for length in lengths]))

    def _dealt(
        self, x: Tensor, positions: Tensor, rotary: Rotary, deal: Any, lengths: list[int], caches: list[Any]
    ) -> Tensor:
        """What this process has of the states of x [1 total c], after all layers."""
        attend = partial(self.place.attend, deal=deal, lengths=lengths)
        x, positions = self.place.take(x, deal, dim=1), self.place.take(positions, deal, dim=0)
        return self._layers(x, positions, rotary, attend, caches, "vkernels")

    def _layers(self, x: Tensor, positions: Tensor, rotary: Rotary, mask: Any, caches: list[Any], impl: str) -> Tensor:
        turn: Any
        if impl == "eager":
            require(not self.place.shared, "VideoLLM", "impl", "be vkernels on a mesh", repr(impl))
            self.llama.rope_parameters = rotary.parameters()
            turn = LlamaRotaryEmbedding(self.llama)(x, positions if positions.dim() == 2 else positions[None])
        else:
            turn = rotary.spec(self.config.head), positions
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, turn, mask, cache, impl)
        return x

    def _dense_mask(self, x: Tensor, prompt: Prompt) -> Tensor | None:
        if self.config.frame_attention == "causal":
            return None
        own = x[:, :1].expand(-1, prompt.length, -1)
        mask = create_causal_mask(self.llama, own, None, None, block_sequence_ids=prompt.blocks())
        assert isinstance(mask, Tensor)  # what transformers makes for SDPA
        return mask
