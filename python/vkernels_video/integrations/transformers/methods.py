"""Methods of known classes replaced whole, by class name: patches, windows, pooling, shuffles, divided blocks.

While torch.compile traces, what only moves rows stays as it was: sizes may be symbols, which a plan cannot hold, and
the compiler fuses such code itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels.rearrangement import RearrangePlan, from_einops, merge_order, pool
from vkernels.rearrangement.plan import gather
from vkernels_video.integrations.transformers import divided, mlp, vjepa2
from vkernels_video.integrations.transformers.merge import marking
from vkernels_video.integrations.transformers.seams import Seam

Made = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """`name(self, *parameters)` of a class: what replaces it, and for which instances it cannot."""

    kind: str
    name: str
    parameters: tuple[str, ...]
    ours: str
    make: Callable[[Any, Seam], Made]
    why_not: Callable[[Any], str | None] = lambda module: None


# ---- Qwen2.5-VL, Qwen3-VL, VideoLLaMA3: patches that come cut out


def _patches(name: str) -> tuple[Method, ...]:
    """A convolution whose steps are as wide as its kernel, over one patch per row, is a matrix product; torch's
    convolutions are several times slower at it."""

    def make(module: Any, seam: Seam) -> Made:
        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            seam.called()
            conv = getattr(self, name)
            rows = hidden_states.view(-1, conv.weight[0].numel()).to(conv.weight.dtype)
            return torch.nn.functional.linear(rows, conv.weight.flatten(1), conv.bias)

        return forward

    def why_not(module: Any) -> str | None:
        conv: Any = getattr(module, name, None)
        if type(conv) not in (torch.nn.Conv2d, torch.nn.Conv3d):
            return f"its {name} is a {type(conv).__name__}"
        steps = conv.stride == conv.kernel_size and conv.groups == 1
        return None if steps and conv.padding in ("valid", (0,) * len(conv.stride)) else f"its {name} overlaps or pads"

    return (Method("patch", "forward", ("hidden_states",), "one matrix product", make, why_not),)


# ---- Qwen2.5-VL: tokens in the order of windows


def _window_gather(module: Any, seam: Seam) -> Made:
    def permute_input_for_window_attn(self: Any, input_tensor: Tensor, window_index: Tensor, seq_len: int) -> Any:
        if torch.compiler.is_compiling():
            return type(self).permute_input_for_window_attn(self, input_tensor, window_index, seq_len)
        seam.called()
        units = seq_len // self.spatial_merge_unit
        idx = window_index[None].to(torch.int32)
        plan = RearrangePlan("window", sources=(units,), n_out=units, idx=idx)  # merged tokens move as one row
        moved: Any = vk.rearrange(input_tensor.reshape(1, units, -1), plan)
        return moved.view(seq_len, -1)

    return permute_input_for_window_attn


@lru_cache(maxsize=8)
def _rows_as_they_are(n: int, device: torch.device) -> RearrangePlan:
    with torch.inference_mode(False):
        return gather("rows", torch.arange(n, dtype=torch.int32, device=device), (n,))


def _vision_block(module: Any, seam: Seam) -> Made:
    """h + attn(norm(h)), then the sum and its norm in one pass, then + mlp."""

    def forward(
        self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **rest: Any
    ) -> Any:
        first, second, h = self.norm1, self.norm2, hidden_states
        if torch.compiler.is_compiling() or not (first.weight.dtype == second.weight.dtype == h.dtype):
            return type(self).forward(self, h, cu_seqlens, position_embeddings, **rest)
        seam.called()
        plan = _rows_as_they_are(h.shape[0], h.device)
        x = vk.rearrange(h, plan, norm="rms", norm_weight=first.weight, eps=first.variance_epsilon)
        x = self.attn(x, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **rest)
        if x.dtype != h.dtype:  # autocast keeps the residual stream in float32
            h = h + x
            return h + self.mlp(second(h))
        how: dict[str, Any] = dict(norm_weight=second.weight, eps=second.variance_epsilon, return_sum=True)
        x, h = vk.rearrange(x, plan, residual=h, norm="rms", **how)
        return h + self.mlp(x)

    return forward


# ---- LLaVA-OneVision, LLaVA-NeXT-Video, VideoLLaMA3: pooled grids


@lru_cache(maxsize=32)
def _pool(h: int, w: int, mode: str, stride: int) -> RearrangePlan:
    return pool(1, h, w, mode=mode, stride=stride)


@lru_cache(maxsize=32)
def _merged_pool(h: int, w: int, merge: int) -> RearrangePlan:
    """Tokens in merge order, halved as torch's bilinear interpolation halves their raster."""
    pooled = pool(1, h, w, mode="bilinear", stride=merge)
    return merge_order(1, h, w, merge).inverse.compose(pooled) if merge > 1 else pooled


def _onevision_pooling(module: Any, seam: Seam) -> Made:
    vision = module.config.vision_config
    side = vision.image_size // vision.patch_size
    plan = _pool(side, side, "bilinear", 2)

    def apply_pooling(self: Any, image_features: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return type(self).apply_pooling(self, image_features)
        seam.called()
        return vk.rearrange(image_features, plan)

    return apply_pooling


def _next_video_pooler(module: Any, seam: Seam) -> Made:
    mode = "mean" if isinstance(module.pool, torch.nn.AvgPool2d) else "max"
    stride = module.pool.stride

    def forward(self: Any, image_features: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return type(self).forward(self, image_features)
        seam.called()
        side = math.isqrt(image_features.shape[1])
        return vk.rearrange(image_features, _pool(side, side, mode, stride))

    return forward


def _pooler_why_not(module: Any) -> str | None:
    if isinstance(module.pool, torch.nn.Conv2d):
        return "it pools by a convolution"
    size, stride = module.pool.kernel_size, module.pool.stride
    return None if isinstance(size, int) and size == stride else f"windows of {size} at a stride of {stride}"


def _video_llama_unshuffle(module: Any, seam: Seam) -> Made:
    def pixel_unshuffle(self: Any, hidden_states: Tensor, grid_thw: Tensor, merge_sizes: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # sizes are values of a tensor
            return type(self).pixel_unshuffle(self, hidden_states, grid_thw, merge_sizes)
        seam.called()
        parts: list[Any] = []
        begin = 0
        for (t, h, w), merge in zip(grid_thw.tolist(), merge_sizes.tolist(), strict=True):
            end = begin + t * h * w
            frames = hidden_states[begin:end].view(t, h * w, -1)
            parts.append(vk.rearrange(frames, _merged_pool(h, w, merge)))
            begin = end
        flat = [part.flatten(0, 1) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=0)

    return pixel_unshuffle


# ---- InternVL, SmolVLM: space to depth


def _space_to_depth(r: int) -> RearrangePlan:
    return from_einops("b (x p) (y q) c -> b x y (p q c)", p=r, q=r)


def _internvl_shuffle(module: Any, seam: Seam) -> Made:
    r = round(1 / module.config.downsample_ratio)
    plan = _space_to_depth(r)

    def pixel_shuffle(self: Any, vision_features: Tensor, scale_factor: float = 0.5) -> Any:
        _, width, height, _ = vision_features.shape
        if torch.compiler.is_compiling() or r * scale_factor != 1 or width % r or height % r:
            return type(self).pixel_shuffle(self, vision_features, scale_factor)
        seam.called()
        return vk.rearrange(vision_features, plan)

    return pixel_shuffle


def _smolvlm_shuffle(module: Any, seam: Seam) -> Made:
    r = module.scale_factor
    plan = _space_to_depth(r)

    def pixel_shuffle(self: Any, x: Tensor, scale_factor: int = 2) -> Any:
        b, s, c = x.shape
        side = math.isqrt(s)
        if torch.compiler.is_compiling() or side * side != s or scale_factor != r or side % r:
            return type(self).pixel_shuffle(self, x, scale_factor)
        seam.called()
        shuffled: Any = vk.rearrange(x.view(b, side, side, c), plan)
        return shuffled.flatten(1, 2)

    return pixel_shuffle


_REARRANGE = "one pass of vkernels.rearrange"

METHODS: dict[str, tuple[Method, ...]] = {
    "Qwen2_5_VisionPatchEmbed": _patches("proj"),
    "Qwen3VLVisionPatchEmbed": _patches("proj"),
    "VideoLlama3VisionEmbeddings": _patches("patch_embedding"),
    "Qwen2_5_VisionTransformerPretrainedModel": (
        Method(
            "window",
            "permute_input_for_window_attn",
            ("input_tensor", "window_index", "seq_len"),
            _REARRANGE,
            _window_gather,
        ),
    ),
    "Qwen2_5_VLVisionBlock": (
        Method(
            "norm",
            "forward",
            ("hidden_states", "cu_seqlens", "position_embeddings"),
            "residual and norm in one pass of vkernels.rearrange",
            _vision_block,
        ),
    ),
    "LlavaOnevisionModel": (Method("pool", "apply_pooling", ("image_features",), _REARRANGE, _onevision_pooling),),
    "LlavaNextVideoPooler": (
        Method("pool", "forward", ("image_features",), _REARRANGE, _next_video_pooler, _pooler_why_not),
    ),
    "VideoLlama3VisionModel": (
        Method(
            "pool", "pixel_unshuffle", ("hidden_states", "grid_thw", "merge_sizes"), _REARRANGE, _video_llama_unshuffle
        ),
    ),
    "InternVLModel": (
        Method("pool", "pixel_shuffle", ("vision_features", "scale_factor"), _REARRANGE, _internvl_shuffle),
    ),
    "SmolVLMConnector": (Method("pool", "pixel_shuffle", ("x", "scale_factor"), _REARRANGE, _smolvlm_shuffle),),
    "TimesformerLayer": (
        Method(
            "block",
            "forward",
            ("hidden_states", "output_attentions"),
            "vkernels.divided_attention, in time and in space",
            divided.timesformer_layer,
            divided.why_not,
        ),
    ),
    "VJEPA2RopeAttention": (
        Method(
            "rope",
            "apply_rotary_embeddings",
            ("qk", "pos_ids"),
            "vkernels.apply_rope, an angle for each member of a pair",
            vjepa2.rotary,
        ),
    ),
}

for _name, _argument in {
    "CLIPMLP": "hidden_states",
    "SiglipMLP": "hidden_states",
    "VisionMlp": "x",
    "Qwen2_5_VLMLP": "hidden_state",
    "Qwen3VLVisionMLP": "hidden_state",
    "VideoLlama3VisionMLP": "hidden_states",
    "InternVLVisionMLP": "hidden_states",
    "SmolVLMVisionMLP": "hidden_states",
    "InstructBlipVideoMLP": "hidden_states",
    "VivitMLP": "hidden_states",
    "VJEPA2MLP": "hidden_state",
}.items():
    METHODS[_name] = (Method("mlp", "forward", (_argument,), f"the same, {mlp.ROWS:,} tokens at a time", mlp.sliced),)

_MERGE = Method("merge", "get_placeholder_mask", ("input_ids", "inputs_embeds"), _REARRANGE, marking)
for _name in (
    "VideoLlavaModel",
    "LlavaNextVideoModel",
    "LlavaOnevisionModel",
    "Qwen2VLModel",
    "Qwen2_5_VLModel",
    "Qwen3VLModel",
    "VideoLlama3Model",
    "InternVLModel",
    "SmolVLMModel",
    "InstructBlipVideoForConditionalGeneration",
):
    METHODS[_name] = (*METHODS.get(_name, ()), _MERGE)
