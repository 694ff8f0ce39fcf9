"""The vision encoder of short clips: a CLIP-like ViT with divided space-time layers.

Every layer is written twice over one set of weights: `_eager` as people write it today, `_vkernels` on the library.
Token order is frame-major, b (clips) x t (frames) x l (CLS and patches).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import vkernels as vk
from vkernels_video.model.clip import by_rows, plus, spared
from vkernels_video.model.config import EncoderConfig


class Attention(nn.Module):
    """CLIP's attention: biased projections, softmax(q k / sqrt(d)) v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def eager(self, x: Tensor) -> Tensor:
        """Sequences [p s c], each attending to itself: what transformers' CLIPAttention does on its SDPA path."""
        q, k, v = (
            proj(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)  # p n s d
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))

    def vkernels(self, x: Tensor, grid: vk.Grid, axis: str) -> Tensor:
        """Tokens [b (t l) c] attend over time at each place ("temporal") or inside their frame ("spatial")."""
        q, k, v = (proj(x).view(*x.shape[:2], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(vk.divided_attention(q, k, v, grid, axis=axis).flatten(2))


class EncoderLayer(nn.Module):
    """Attention over frames for every patch, attention over patches in every frame, MLP; each with a residual."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.width
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.frames, width))
        self.temporal_layer_norm1 = nn.LayerNorm(width, config.eps)
        self.temporal_attn = Attention(width, config.heads)
        self.layer_norm1 = nn.LayerNorm(width, config.eps)
        self.self_attn = Attention(width, config.heads)
        self.layer_norm2 = nn.LayerNorm(width, config.eps)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, frames: int, impl: str) -> Tensor:
        """x [b (t l) c]."""
        if impl == "eager":
            x = self._eager(x, frames)
            return x + self.mlp(self.layer_norm2(x))
        x = self._vkernels(x, frames)
        wide, act, last = self.mlp
        if not spared(wide, last):
            return x + self.mlp(self.layer_norm2(x))
        return by_rows(x, self.layer_norm2(x), lambda rows: act(wide(rows)), cast(nn.Linear, last))

    def _eager(self, x: Tensor, frames: int) -> Tensor:
        # LanguageBind's layer: the permutes make each attention a batch of plain sequences.
        tokens = x.shape[1] // frames
        x = rearrange(x, "b (t l) c -> (b l) t c", t=frames)
        x = x + self.temporal_embedding[:, :frames]
        x = x + self.temporal_attn.eager(self.temporal_layer_norm1(x))
        x = rearrange(x, "(b l) t c -> (b t) l c", l=tokens)
        x = x + self.self_attn.eager(self.layer_norm1(x))
        return rearrange(x, "(b t) l c -> b (t l) c", t=frames)

    def _vkernels(self, x: Tensor, frames: int) -> Tensor:
        # The tokens stay where they are; CLS has a place of its own in every frame, so it is one more column here.
        grid = vk.Grid(frames, 1, x.shape[1] // frames)
        x = (x.unflatten(1, (frames, -1)) + self.temporal_embedding[:, :frames, None]).flatten(1, 2)
        x = plus(self.temporal_attn.vkernels(self.temporal_layer_norm1(x), grid, "temporal"), x)
        return plus(self.self_attn.vkernels(self.layer_norm1(x), grid, "spatial"), x)


class Encoder(nn.Module):
    """Pixels of clips [b t 3 h w] -> features [b t l c], CLS first in every frame."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(config.tokens, width))
        self.pre_layrnorm = nn.LayerNorm(width, config.eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, pixels: Tensor, impl: str) -> Tensor:
        b, t = pixels.shape[:2]
        patches = self.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)  # (b t) l c
        cls = self.class_embedding.expand(b * t, 1, -1)
        x = self.pre_layrnorm(torch.cat([cls, patches], dim=1) + self.position_embedding)
        x = x.reshape(b, -1, self.config.width)
        for layer in self.layers[: len(self.layers) + 1 + self.config.select_layer]:
            x = layer(x, t, impl)
        return x.view(b, t, -1, self.config.width)
