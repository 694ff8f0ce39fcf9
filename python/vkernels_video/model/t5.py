"""T5's block as a reasoner's: no positions but a learned bias on every score, which depends on how far apart two tokens
are (T5, arXiv:1910.10683).

No kernel of the library takes an additive bias, so attention is PyTorch's here on both sides; `impl` changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vkernels_video.model.config import T5Config


def bucket(distance: Tensor, causal: bool, count: int, most: int) -> Tensor:
    """The row of the bias table for key minus query position: one each for near ones, logarithmically wider up to
    `most`, the last for all beyond. Without `causal` half of the table is for keys that come later."""
    first = torch.zeros_like(distance)
    if not causal:
        count //= 2
        first = (distance > 0) * count
        distance = -distance.abs()
    back = (-distance).clamp(min=0)
    exact = count // 2
    far = torch.log(back.clamp(min=1).float() / exact) / math.log(most / exact) * (count - exact)
    return first + torch.where(back < exact, back, (exact + far.long()).clamp(max=count - 1))


class T5SelfAttention(nn.Module):
    """softmax(q k^T + bias) v: the scores are not scaled, and a head need not be width / heads wide."""

    def __init__(self, config: T5Config, bias: Callable[[int, int], Tensor]):
        super().__init__()
        inner = config.heads * config.head
        self.heads, self.causal, self.bias = config.heads, config.causal, bias
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        shape = (2, 1, config.prefix, config.heads, config.head)
        self.prefix = nn.Parameter(torch.randn(shape) * 0.02) if config.prefix else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v  # b s n d

    def forward(self, x: Tensor, window: int | None, impl: str) -> Tensor:
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        if self.causal:
            visible = visible.tril() if window is None else visible.tril().triu(1 - window)
        return self.dense(*self.project(x), visible)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Over what is `visible` [s_q s_k]; the queries are the last tokens. A prefix stands nowhere: no bias."""
        bias = self.bias(q.shape[1], k.shape[1]).masked_fill(~visible, -math.inf)
        if self.prefix is not None:
            k, v = (torch.cat([p.expand(len(q), -1, -1, -1), x], 1) for p, x in zip(self.prefix, (k, v), strict=True))
            bias = F.pad(bias, (self.prefix.shape[2], 0))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class T5Layer(nn.Module):
    def __init__(self, config: T5Config, bias: Callable[[int, int], Tensor]):
        super().__init__()
        width, mlp = config.width, config.mlp
        self.self_attn = T5SelfAttention(config, bias)
        self.self_attn_layer_norm = nn.RMSNorm(width, config.eps)
        self.wi = nn.Linear(width, mlp, bias=False)
        self.wg = nn.Linear(width, mlp, bias=False) if config.gated else None
        self.wo = nn.Linear(mlp, width, bias=False)
        self.final_layer_norm = nn.RMSNorm(width, config.eps)

    def forward(self, x: Tensor, window: int | None, impl: str) -> Tensor:
        return self.after(x, self.self_attn(self.self_attn_layer_norm(x), window, impl))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        y = self.final_layer_norm(x)
        inner = F.relu(self.wi(y)) if self.wg is None else F.gelu(self.wi(y), approximate="tanh") * self.wg(y)
        return x + self.wo(inner)
