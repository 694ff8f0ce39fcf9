"""Kernels for video language models: masked space-time attention, token rearrangement, RoPE interpolation."""

from vkernels import nn, rearrangement
from vkernels.check import NoBackend, ShapeError
from vkernels.compat.sdpa import sdpa
from vkernels.explain import explain
from vkernels.kv_cache import KVCache
from vkernels.masks import Grid, MaskPlan, Text, Video, VideoMask, lower_mask
from vkernels.merge import merge_attentions
from vkernels.ops.apply_rope import apply_rope
from vkernels.ops.attention import attention
from vkernels.ops.decode_attention import decode_attention
from vkernels.ops.divided_attention import divided_attention
from vkernels.ops.kv_append import kv_append
from vkernels.ops.qkv_prologue import qkv_prologue
from vkernels.ops.rearrange import rearrange
from vkernels.rearrangement import RearrangePlan
from vkernels.rope import RopeSpec, rope_positions

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "KVCache",
    "MaskPlan",
    "NoBackend",
    "RearrangePlan",
    "RopeSpec",
    "ShapeError",
    "Text",
    "Video",
    "VideoMask",
    "apply_rope",
    "attention",
    "decode_attention",
    "divided_attention",
    "explain",
    "kv_append",
    "lower_mask",
    "merge_attentions",
    "nn",
    "qkv_prologue",
    "rearrange",
    "rearrangement",
    "rope_positions",
    "sdpa",
]
