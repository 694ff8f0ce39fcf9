"""A frozen image encoder run frame by frame: CLIP's vision tower and EVA's differ in four fields of one config."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkernels as vk
from vkernels_video.model.config import TextTowerConfig, TrunkConfig

QUICK = 1.702
ROWS = 512  # of an MLP at a time


def linear(*maps: nn.Module) -> bool:
    """Whether these are linear maps and nothing more, to be taken apart at will: an adapter put around one is more."""
    return all(type(each) is nn.Linear for each in maps)


def spared(*maps: nn.Module) -> bool:
    """`linear`, and no gradient is wanted."""
    return not torch.is_grad_enabled() and linear(*maps)


def plus(own: Tensor, x: Tensor) -> Tensor:
    """own + x; `own` is spent where no gradient is wanted."""
    return own + x if torch.is_grad_enabled() else own.add_(x)


def by_rows(z: Tensor, x: Tensor, inner: Callable[[Tensor], Tensor], last: nn.Linear, scale: float = 1.0) -> Tensor:
    """z + last(scale inner(x)) written into z, without gradients: some rows at a time, so that the wide states in the
    middle stay in the cache and never exist as a whole."""
    into, rows = z.flatten(0, -2), x.flatten(0, -2)
    for first in range(0, len(into), ROWS):
        part = slice(first, first + ROWS)
        into[part].addmm_(inner(rows[part]), last.weight.T, alpha=scale)
    if last.bias is not None:
        into.add_(last.bias)
    return into.view_as(z)


class QuickGELU(nn.Module):
    """CLIP's activation, x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(QUICK * x)


class MLP(nn.Module):
    def __init__(self, config: TrunkConfig | TextTowerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.act = QuickGELU() if config.activation == "quick_gelu" else nn.GELU()
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def onto(self, z: Tensor, x: Tensor) -> Tensor:
        """z + self(x); z is spent."""
        if not spared(self.fc1, self.fc2):
            return z + self(x)
        if not isinstance(self.act, QuickGELU):
            return by_rows(z, x, lambda rows: self.act(self.fc1(rows)), self.fc2)
        # x sigmoid(a x) is silu(a x) / a: the two products take the factors in.
        bias, weight = self.fc1.bias * QUICK, self.fc1.weight.T

        def inner(rows: Tensor) -> Tensor:
            return F.silu(torch.addmm(bias, rows, weight, alpha=QUICK), inplace=True)

        return by_rows(z, x, inner, self.fc2, 1 / QUICK)


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

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [b s n d], and the bias `out` then wants, None for its own. Without gradients two biases stay out of
        the products: a key's moves all scores of a query alike, a value's passes through into the output's."""
        if not spared(self.k_proj, self.v_proj, self.out_proj):
            return *self.project(x), None
        maps = self.q_proj(x), x @ self.k_proj.weight.T, x @ self.v_proj.weight.T
        q, k, v = (heads.unflatten(-1, (self.heads, -1)) for heads in maps)
        return q, k, v, torch.addmv(self.out_proj.bias, self.out_proj.weight, self.v_proj.bias)

    def out(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.out_proj(x) if bias is None else F.linear(x, self.out_proj.weight, bias)

    def forward(self, x: Tensor, impl: str, causal: bool = False) -> Tensor:
        """Sequences [p s c], each attending to itself."""
        if impl == "vkernels":
            q, k, v, bias = self.projected(x)
            out = vk.attention(q, k, v, mask=vk.VideoMask.causal(x.shape[1]) if causal else None)
            assert isinstance(out, Tensor)
            return self.out(out.flatten(2), bias)
        q, k, v = (heads.transpose(1, 2) for heads in self.project(x))
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
        attended = self.self_attn(self.layer_norm1(x), impl, causal)
        if impl == "eager":
            x = x + attended
            return x + self.mlp(self.layer_norm2(x))
        x = plus(attended, x)
        return self.mlp.onto(x, self.layer_norm2(x))


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
        self.visual_projection = nn.Linear(width, config.projection, bias=config.projection_bias)

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
