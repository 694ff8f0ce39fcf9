"""A frozen image encoder run frame by frame: CLIP's vision tower and EVA's differ in four fields of one config."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkernels as vk
from vkernels_video.model.config import TextTowerConfig, TrunkConfig


class QuickGELU(nn.Module):
    """CLIP's activation, x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    def __init__(self, config: TrunkConfig | TextTowerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.act = QuickGELU() if config.activation == "quick_gelu" else nn.GELU()
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v between biased projections; EVA's keys have no bias."""

    def __init__(self, config: TrunkConfig | TextTowerConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=config.key_bias)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [b s n d] of tokens [b s c]."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def forward(self, x: Tensor, impl: str, causal: bool = False) -> Tensor:
        """Sequences [p s c], each attending to itself."""
        q, k, v = self.project(x)
        if impl == "vkernels":
            out = vk.attention(q, k, v, mask=vk.VideoMask.causal(x.shape[1]) if causal else None)
            assert isinstance(out, Tensor)
        else:
            q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        return self.out_proj(out.flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block; the keys of its state are those of transformers' CLIPEncoderLayer."""

    def __init__(self, config: TrunkConfig | TextTowerConfig, eps: float | None = None):
        super().__init__()
        eps = config.eps if eps is None else eps
        self.layer_norm1 = nn.LayerNorm(config.width, eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, impl: str, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), impl, causal)
        return x + self.mlp(self.layer_norm2(x))


class Trunk(nn.Module):
    """Frames [b t 3 h w] -> tokens [b t 1+l c] after each of the last blocks, CLS first."""

    def __init__(self, config: TrunkConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Embedding(config.tokens, width)
        self.pre_layrnorm = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.post_layernorm = nn.LayerNorm(width, config.eps)
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    @property
    def depth(self) -> int:
        """How many blocks make the features."""
        return len(self.layers) + 1 + self.config.select_layer

    def taps(self, frames: Tensor, first: int, until: int, impl: str) -> list[Tensor]:
        """The tokens after blocks `first` .. `until - 1`; blocks from `until` on are not run."""
        b, t = frames.shape[:2]
        patches = self.patch_embedding(frames.flatten(0, 1)).flatten(2).transpose(1, 2)  # (b t) l c
        cls = self.class_embedding.expand(b * t, 1, -1)
        x = self.pre_layrnorm(torch.cat([cls, patches], dim=1) + self.position_embedding.weight)
        kept = []
        for i, block in enumerate(self.layers[:until]):
            x = block(x, impl)
            if i >= first:
                kept.append(x.unflatten(0, (b, t)))
        return kept
