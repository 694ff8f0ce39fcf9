"""xformers.ops: the functions this library serves."""

from vkernels.compat.xformers.ops import fmha
from vkernels.compat.xformers.ops.fmha import (
    AttentionBias,
    LowerTriangularMask,
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from vkernels.compat.xformers.ops.indexing import index_select_cat, scaled_index_add

__all__ = [
    "AttentionBias",
    "LowerTriangularMask",
    "fmha",
    "index_select_cat",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "scaled_index_add",
]
