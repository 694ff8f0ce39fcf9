"""Kernels for video language models: masked space-time attention, token rearrangement, RoPE interpolation."""

from vkernels.check import NoBackend, ShapeError
from vkernels.kv_cache import KVCache
from vkernels.ops.apply_rope import apply_rope
from vkernels.ops.decode_attention import decode_attention
from vkernels.ops.kv_append import kv_append

__version__ = "0.1.0"

__all__ = ["KVCache", "NoBackend", "ShapeError", "apply_rope", "decode_attention", "kv_append"]
