"""torch's view of decode_attention: schema, fake, CPU kernel. No gradient: a cache is for inference."""

from __future__ import annotations

import torch

from vkernels.kv_cache import STORAGE
from vkernels.library import lazily, native, ref, register


def _fake(q, length, table, *rest):
    b, s, n, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(b, n, s, dtype=torch.float32)


def _cpu(q, length, table, *rest):
    *storage, scale, window, layout = rest
    o, lse = _fake(q, length, table)
    tensors = [ref(t) for t in storage]
    native().decode_attention(ref(q), ref(length), ref(table), tensors, scale, window, layout, ref(o), ref(lse))
    return o, lse


register(
    "decode_attention",
    f"(Tensor q, Tensor length, Tensor table, {', '.join(f'Tensor? {name}' for name in STORAGE)}, "
    "float scale, int window, int[] layout) -> (Tensor o, Tensor lse)",
    fake=_fake,
    backends={"cpu": _cpu, "triton": lazily("vkernels.ops.decode_attention.triton", "decode_attention")},
)
