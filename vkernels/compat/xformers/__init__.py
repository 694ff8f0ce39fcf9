"""xformers by name and argument, on these kernels: `vkernels.compat.xformers` for `xformers`, `.ops` included.

Masks are served as values, additive biases and dropout are refused in a sentence. Bias objects of `attn_bias` here and
those of xformers itself are read alike.
"""

from vkernels.compat.xformers import ops
from vkernels.compat.xformers.ops.fmha import (
    attn_bias,
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
    merge_attentions,
)
from vkernels.compat.xformers.ops.indexing import index_select_cat, scaled_index_add

__all__ = [
    "attn_bias",
    "index_select_cat",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
    "ops",
    "scaled_index_add",
]
