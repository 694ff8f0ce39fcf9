"""TimeSformer's layer: attention over time, then over space, on the tokens as they lie (patch-major, one CLS in front).

Stock folds the tokens into sequences, repeats the CLS token for every frame and folds them back, twice per layer. Here
the projections run on the tokens in place, `divided_attention` reads its groups by stride, and the CLS token is
projected once: the mean of its outputs over the frames commutes with the output projection. Between two projections
stands one pass of `rearrange`: bias, residual sum and the next norm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import vkernels as vk
from vkernels.rearrangement import RearrangePlan
from vkernels.rearrangement.plan import gather
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


@lru_cache(maxsize=16)
def _rows(first: int, last: int, sources: int, device: torch.device) -> RearrangePlan:
    """Output rows first .. last - 1 of the source, -1 for a row of zeros."""
    with torch.inference_mode(False):
        return gather("rows", torch.arange(first, last, dtype=torch.int32, device=device), (sources,))


def _attend(attention: Any, x: Tensor, grid: vk.Grid, axis: str, cls: int) -> Tensor:
    inner = attention.attention
    qkv = inner.qkv(x).unflatten(-1, (3, inner.num_heads, -1))  # b s 3 n d
    q, k, v = qkv.unbind(2)
    o = vk.divided_attention(q, k, v, grid, axis=axis, cls=cls, order="patch", scale=inner.scale)
    return o.flatten(2)


def _one_pass(layer: Any, x: Tensor) -> bool:
    """Whether sums and norms can share a pass: one dtype throughout, and no compiler that fuses them itself."""
    norms = (layer.temporal_layernorm, layer.layernorm_before, layer.layernorm_after)
    plain = all(type(norm) is torch.nn.LayerNorm and norm.elementwise_affine for norm in norms)
    if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    return all(norm.weight.dtype == x.dtype and norm.bias is not None for norm in norms)


def _how(norm: Any) -> dict[str, Any]:
    return dict(norm="layer", norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)


def _in_passes(layer: Any, x: Tensor, grid: vk.Grid) -> Tensor:
    s, device = x.shape[1], x.device
    plain, shifted = _rows(0, s, s, device), _rows(-1, s - 1, s - 1, device)  # shifted: no patch for the CLS token
    t: Any = vk.rearrange(x, _rows(1, s, s, device), **_how(layer.temporal_layernorm))
    t = layer.temporal_attention.output.dense(_attend(layer.temporal_attention, t, grid, "temporal", 0))
    y = layer.temporal_dense(t)
    h, x = vk.rearrange(y, shifted, residual=x, return_sum=True, **_how(layer.layernorm_before))
    dense = layer.attention.output.dense
    y = linear(_attend(layer.attention, h, grid, "spatial", 1), dense.weight)
    h, x = vk.rearrange(y, plain, bias=dense.bias, residual=x, return_sum=True, **_how(layer.layernorm_after))
    dense = layer.output.dense
    out: Any = vk.rearrange(linear(layer.intermediate(h), dense.weight), plain, bias=dense.bias, residual=x)
    return out


def _in_steps(layer: Any, x: Tensor, grid: vk.Grid) -> Tensor:
    patches = x[:, 1:]
    t = _attend(layer.temporal_attention, layer.temporal_layernorm(patches), grid, "temporal", 0)
    t = layer.temporal_dense(layer.temporal_attention.output.dense(t))
    x = torch.cat((x[:, :1], patches + t), 1)
    h = _attend(layer.attention, layer.layernorm_before(x), grid, "spatial", 1)
    x = x + layer.attention.output.dense(h)
    return x + layer.output(layer.intermediate(layer.layernorm_after(x)))


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
        return ((_in_passes if _one_pass(self, hidden_states) else _in_steps)(self, hidden_states, grid),)

    return forward
