"""Decoding from a cache whose sequences are cut over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.check import require
from vkernels.distributed.exchange import all_gather, group_of
from vkernels.kv_cache import KVCache
from vkernels.merge import merge_attentions
from vkernels.ops.decode_attention import decode_attention as decode_own

OP = "distributed.decode_attention"


@torch.compiler.disable
def decode_attention(
    q: Tensor,
    cache: KVCache,
    mesh: Any = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The newest token against the tokens of every rank's cache; each rank gets the answer.

    Args:
        q:     (b 1 n d), the same on every rank
        cache: this rank's tokens, of any scheme; which rank holds which is the caller's choice, and one may hold none
        the others: as vkernels.decode_attention and distributed.attention
    Returns:
        o (b 1 n d); with return_lse also (b n 1) float32
    Gradients: none.   Deterministic: yes.   torch.compile: breaks the graph.
    Sends one output and lse per rank, whatever the caches hold.
    Source: Flash-Decoding's merge, over ranks.
    """
    group = group_of(mesh, OP)
    require(q.dim() == 4 and q.shape[1] == 1, OP, "q", "hold one token", tuple(q.shape))
    out, lse = decode_own(q, cache, scale=scale, return_lse=True, backend=backend)
    packed = torch.cat([out.float(), lse.transpose(1, 2)[..., None]], -1)  # b 1 n d+1
    parts = all_gather(packed.contiguous(), len(q), group)
    outs, lses = [p[..., :-1] for p in parts], [p[..., -1].transpose(1, 2).contiguous() for p in parts]
    merged, total = merge_attentions(outs, lses)
    merged = merged.to(q.dtype)
    return (merged, total) if return_lse else merged
