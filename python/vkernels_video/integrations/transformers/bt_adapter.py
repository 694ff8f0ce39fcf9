"""BT-Adapter's layers as its authors and ST-LLM publish them, on CLIP and EVA: time, then space, each replaced whole.

Stock folds the tokens (patch-major, one CLS in front) into sequences, repeats the CLS for every frame, averages what
came of it and folds back. Here the projections run on the tokens where they lie, `divided_attention` reads its groups
by stride, and the CLS is projected once: the mean over the frames commutes with the output projection.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

import vkernels as vk
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.fitting import Fitter
from vkernels_video.integrations.transformers.report import TOLERANCE
from vkernels_video.integrations.transformers.seams import Seam

KIND = "divided"


@dataclass(frozen=True)
class Form:
    """How one family of modules names its parts, and how its attention projects."""

    parameters: tuple[str, ...]  # of forward
    attention: str
    norms: tuple[str, str]  # before the attention, before the MLP
    drop: str  # stochastic depth of the attention's output
    out: str  # the attention's output projection
    projections: tuple[str, ...]  # the other attributes `project` reads
    project: Callable[[Any, Tensor], Any]  # q, k, v (b s n d)
    told: bool  # forward is told the number of frames; else the module keeps it in `t`


def _three(attention: Any, x: Tensor) -> Any:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [project(x).unflatten(-1, (attention.num_heads, -1)) for project in projections]


def _packed(attention: Any, x: Tensor) -> Any:
    """One matrix; q and v have a bias, k has none."""
    bias = None
    if attention.q_bias is not None:
        bias = torch.cat((attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias))
    return linear(x, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)


CLIP = Form(
    parameters=("hidden_states", "attention_mask", "causal_attention_mask"),
    attention="self_attn",
    norms=("layer_norm1", "layer_norm2"),
    drop="dropout_layer",
    out="out_proj",
    projections=("q_proj", "k_proj", "v_proj"),
    project=_three,
    told=False,
)
EVA = Form(
    parameters=("x", "T"),
    attention="attn",
    norms=("norm1", "norm2"),
    drop="drop_path",
    out="proj",
    projections=("qkv", "q_bias", "v_bias"),
    project=_packed,
    told=True,
)
LAYERS: dict[str, tuple[Form, str]] = {
    "BTAdapterLayer_Time": (CLIP, "temporal"),
    "BTAdapterLayer_Spatial": (CLIP, "spatial"),
    "CLIPLayer_AttnTime": (CLIP, "temporal"),
    "CLIPLayer_Spatial": (CLIP, "spatial"),
    "BTAdapter_Temp": (EVA, "temporal"),
    "BTAdapter_Spatial": (EVA, "spatial"),
}


def replace(fitter: Fitter, module: Any) -> None:
    """Replace a layer of BT-Adapter, or say why not; any other module is left alone."""
    found = next((LAYERS[base.__name__] for base in type(module).__mro__ if base.__name__ in LAYERS), None)
    if found is None:
        return None
    form, axis = found
    if (lost := _lost(module, form, axis)) is not None:
        return fitter.lost(KIND, module, lost)
    if (reason := _why_not(module, form)) is not None:
        return fitter.leave(KIND, module, reason)
    if not _agrees(module, form, axis):
        what = f"{type(module).__name__} computes something else than divided attention over {_OVER[axis]}"
        return fitter.lost(KIND, module, what)
    seam = fitter.count(KIND, module, f"forward of {type(module).__module__}", "vkernels.divided_attention")
    return fitter.patches.set(module, "forward", types.MethodType(_forward(form, axis, seam), module))


_OVER = {"temporal": "time", "spatial": "space"}


def _lost(module: Any, form: Form, axis: str) -> str | None:
    """None where the layer has the parts of its form, else a sentence."""
    name = type(module).__name__
    taken = host.parameters(type(module).forward)[1:]
    if taken != list(form.parameters):
        return f"{name}.forward takes ({', '.join(taken)})"
    rest = ("temporal_fc",) if axis == "temporal" else (form.norms[1], "mlp")
    inner = (*form.projections, form.out, "num_heads", "scale")
    parts = [form.attention, form.norms[0], form.drop, *rest, *(f"{form.attention}.{part}" for part in inner)]
    missing = [part for part in parts if not _has(module, part)]
    return f"{name} has no {', '.join(missing)}" if missing else None


def _has(module: Any, path: str) -> bool:
    first, _, rest = path.partition(".")
    return hasattr(module, first) and (not rest or _has(getattr(module, first), rest))


def _why_not(module: Any, form: Form) -> str | None:
    """A sentence for an instance that `divided_attention` does not serve."""
    if "forward" in module.__dict__:
        return "its forward is bound to the instance already (accelerate, another patch)"
    if getattr(module, "num_cls", 1) != 1:
        return f"it has {module.num_cls} CLS tokens, one is served"
    if getattr(getattr(module, form.attention), "relative_position_bias_table", None) is not None:
        return "its attention adds a relative position bias"
    return None


# ---- the two layers


def _temporal(layer: Any, form: Form, z: Tensor, t: int) -> Tensor:
    attention, drop = getattr(layer, form.attention), getattr(layer, form.drop)
    p = (z.shape[1] - 1) // t
    q, k, v = form.project(attention, getattr(layer, form.norms[0])(z))
    o = vk.divided_attention(q, k, v, vk.Grid(t, 1, p), cls=1, order="patch", scale=attention.scale)
    y = getattr(attention, form.out)(o.flatten(2))
    if _drops(layer, form):  # a draw per tube, as stock makes it
        kept = drop(y.new_ones(len(y) * p, 1, 1)).view(len(y), p).repeat_interleave(t, dim=1)
        y = y * pad(kept, (1, 0))[..., None]
    y = layer.temporal_fc(y)
    y[:, 0] = 0  # the CLS passes by
    return z + y


def _spatial(layer: Any, form: Form, z: Tensor, t: int) -> Tensor:
    attention = getattr(layer, form.attention)
    grid = vk.Grid(t, 1, (z.shape[1] - 1) // t)
    q, k, v = form.project(attention, getattr(layer, form.norms[0])(z))
    o = vk.divided_attention(q, k, v, grid, axis="spatial", cls=1, order="patch", scale=attention.scale)
    z = z + getattr(attention, form.out)(o.flatten(2))
    return z + layer.mlp(getattr(layer, form.norms[1])(z))


_STEPS = {"temporal": _temporal, "spatial": _spatial}


def _drops(layer: Any, form: Form) -> bool:
    return layer.training and getattr(getattr(layer, form.drop), "drop_prob", None) not in (None, 0.0)


def _random(layer: Any, form: Form, axis: str) -> str | None:
    """Draws that only the folded sequences of stock can have."""
    if not layer.training:
        return None
    own = getattr(getattr(layer, form.attention), "dropout", 0.0)
    if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in layer.modules()) or (isinstance(own, float) and own):
        return "dropout while training"
    return "stochastic depth per frame while training" if axis == "spatial" and _drops(layer, form) else None


def _forward(form: Form, axis: str, seam: Seam) -> Callable[..., Any]:
    def run(layer: Any, z: Tensor, t: int, *masks: Any) -> Any:
        reason = _random(layer, form, axis)
        if any(mask is not None for mask in masks):
            reason = "a mask is given"
        elif t < 1 or (z.shape[1] - 1) % t:
            reason = f"tokens are no whole number of {t} frames"
        if reason is not None:
            seam.left_to_stock(reason)
            return type(layer).forward(layer, z, *((t,) if form.told else masks))
        seam.called()
        return _STEPS[axis](layer, form, z, t)

    def clip(self: Any, hidden_states: Tensor, attention_mask: Any = None, causal_attention_mask: Any = None) -> Any:
        return run(self, hidden_states, self.t, attention_mask, causal_attention_mask)

    def eva(self: Any, x: Tensor, T: int) -> Any:
        return run(self, x, T)

    return eva if form.told else clip


# ---- does it compute what its name says?


class _Both(torch.nn.Module):
    """Stock and ours on one input, so that weights can be exchanged for both at once."""

    def __init__(self, layer: Any, form: Form, axis: str):
        super().__init__()
        self.layer, self.form, self.axis = layer, form, axis

    def forward(self, z: Tensor, t: int) -> tuple[Tensor, Tensor]:
        stock = type(self.layer).forward(self.layer, z, *((t,) if self.form.told else (None, None)))
        return stock, _STEPS[self.axis](self.layer, self.form, z, t)


@torch.no_grad()
def _agrees(layer: Any, form: Form, axis: str) -> bool:
    """Both on 2 videos of 3 frames of 2 patches; a temporal_fc that starts as zero is exchanged, it would hide all."""
    weight = getattr(getattr(layer, form.attention), form.out).weight
    dtypes = {p.dtype for p in layer.parameters() if p.is_floating_point()}
    z = torch.randn(2, 7, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    exchanged = {}
    if "temporal_fc.weight" in dict(layer.named_parameters()):
        exchanged["layer.temporal_fc.weight"] = torch.eye(len(weight)).to(weight)
    modes, frames = [(m, m.training) for m in layer.modules()], layer.__dict__.get("t")
    layer.eval()
    try:
        if not form.told:
            layer.t = 3
        with torch.autocast(z.device.type, weight.dtype, enabled=len(dtypes) > 1):
            stock, ours = torch.func.functional_call(_Both(layer, form, axis), exchanged, (z, 3))
    finally:
        for module, mode in modes:
            module.training = mode
        if not form.told:
            layer.t = frames
    change = (stock - z).abs().max().clamp_min(1e-6)
    return stock.shape == ours.shape and bool((ours - stock).abs().max() <= TOLERANCE.get(weight.dtype, 2e-4) * change)
