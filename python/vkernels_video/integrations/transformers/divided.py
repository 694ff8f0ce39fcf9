"""TimeSformer's layer: attention over time, then over space, on the tokens as they lie (patch-major, one CLS in front).

Stock folds the tokens into sequences, repeats the CLS token for every frame and folds them back, twice per layer. Here
the projections run on the tokens in place, `divided_attention` reads its groups by stride, and the CLS token is
projected once: the mean of its outputs over the frames commutes with the output projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels_video.integrations.transformers.fitting import weights_refused
from vkernels_video.integrations.transformers.seams import Seam


def why_not(layer: Any) -> str | None:
    """None where `timesformer_layer` computes what this layer does, else a sentence."""
    if layer.attention_type != "divided_space_time":
        return f"its attention_type is {layer.attention_type}: one softmax, computed inline"
    return None


def _random(layer: Any) -> bool:
    """Dropout or stochastic depth is at work: its draws are per folded sequence, which only the stock layer has."""
    if not layer.training:
        return False
    drops = (module for module in layer.modules() if isinstance(module, torch.nn.Dropout))
    return getattr(layer.drop_path, "drop_prob", 0.0) > 0 or any(drop.p > 0 for drop in drops)


def _attend(attention: Any, x: Tensor, grid: vk.Grid, axis: str, cls: int) -> Tensor:
    inner = attention.attention
    qkv = inner.qkv(x).unflatten(-1, (3, inner.num_heads, -1))  # b s 3 n d
    q, k, v = qkv.unbind(2)
    o = vk.divided_attention(q, k, v, grid, axis=axis, cls=cls, order="patch", scale=inner.scale)
    return attention.output.dense(o.flatten(2))


def timesformer_layer(layer: Any, seam: Seam) -> Any:
    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        if output_attentions:
            raise ValueError(weights_refused(type(self).__name__))
        if _random(self):
            seam.left_to_stock("dropout or stochastic depth while training")
            return type(self).forward(self, hidden_states, output_attentions)
        seam.called()
        frames = self.config.num_frames
        width = self.config.image_size // self.config.patch_size
        grid = vk.Grid(frames, (hidden_states.shape[1] - 1) // frames // width, width)
        patches = hidden_states[:, 1:]
        over_time = _attend(self.temporal_attention, self.temporal_layernorm(patches), grid, "temporal", 0)
        x = torch.cat((hidden_states[:, :1], patches + self.temporal_dense(over_time)), 1)
        x = x + _attend(self.attention, self.layernorm_before(x), grid, "spatial", 1)
        return (x + self.output(self.intermediate(self.layernorm_after(x))),)

    return forward
