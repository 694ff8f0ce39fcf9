"""A bias, xformers' own or ours, as the mask plan of this library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.check import refusal, require
from vkernels.compat import intervals
from vkernels.compat.flash_attn.kvcache import paged_rows
from vkernels.compat.xformers.ops.fmha.attn_bias import SERVED
from vkernels.masks import MaskPlan

OP = "memory_efficient_attention"


def served(bias: Any) -> type:
    """Our class of the bias's name: the exact one, as a subclass may see something else."""
    name = type(bias).__name__
    if isinstance(bias, Tensor) or "TensorBias" in name:
        raise NotImplementedError(
            refusal(OP, "attn_bias", "be a mask (an AttentionBias), there is no kernel for additive biases", name)
        )
    if name not in SERVED:
        rule = f"be one of {', '.join(SERVED)}"
        raise NotImplementedError(refusal(OP, "attn_bias", rule, name))
    return SERVED[name]


def plan_of(bias: Any, s_q: int, s_k: int, device: torch.device) -> MaskPlan | None:
    """None where every query sees every key."""
    if bias is None:
        return None
    band = served(bias).band(bias)  # type: ignore[attr-defined]
    if not hasattr(bias, "q_seqinfo"):
        return intervals.uniform(s_q, s_k, band, device)
    q = bias.q_seqinfo
    start_k, length, last_k = _key_blocks(bias, device)
    for argument, given, tokens in (("query", q.seqstart_py[-1], s_q), ("key", last_k, s_k)):
        require(given == tokens, OP, argument, f"have the {given} tokens that attn_bias speaks of", tokens)
    start_q = q.seqstart.to(device)
    if len(start_q) < 2:
        nothing = torch.zeros((1, s_q), dtype=torch.int32, device=device)
        return intervals.plan(nothing, nothing, s_k)
    return intervals.packed(start_q, start_k, length, s_q, s_k, band)


def _key_blocks(bias: Any, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Where each sequence's keys start, how many there are, and the tokens of the dimension (pages gathered)."""
    k = bias.k_seqinfo
    start = k.seqstart.to(device)
    if not hasattr(k, "seqlen"):
        return start, start.diff(), k.seqstart_py[-1]
    length = k.seqlen.to(device)
    table = getattr(bias, "block_tables", None)
    if table is None:
        return start, length, k.seqstart_py[-1]
    row = torch.arange(len(table), device=device) * (table.shape[1] * bias.page_size)
    tokens = table.numel() * bias.page_size
    if hasattr(k, "padding"):
        return row, length, tokens
    return row + start[:-1], length - start[:-1], tokens  # a gappy length is where the sequence ends in its pages


def unpaged(bias: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1 tokens m d) as the bias's blocks lie: pages are gathered, others are as they were."""
    table = getattr(bias, "block_tables", None)
    if table is None:
        return key, value
    require(key.shape[1] % bias.page_size == 0, OP, "key", f"hold pages of {bias.page_size} tokens", key.shape[1])
    rows = (paged_rows(OP, x[0].unflatten(0, (-1, bias.page_size)), table, None) for x in (key, value))
    k, v = (x.flatten(0, 1)[None] for x in rows)
    return k, v
