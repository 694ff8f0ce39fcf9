"""Attention modules of those years, forward for forward, on `vkernels.attention`.

Projections are the module's own (a LoRA around one runs as before), keys and values enter its cache as they did, and
what comes back has the form its layer unpacks. What our attention does not do (dropout, a dense mask, a relative bias)
goes to the module's stock forward, counted with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels_video.integrations.eras import masks
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.attention import attention_forward, one_dtype, why_stock
from vkernels_video.integrations.transformers.fitting import weights_refused
from vkernels_video.integrations.transformers.known import reads_softmax
from vkernels_video.integrations.transformers.masks import StructuredMask
from vkernels_video.integrations.transformers.seams import Seam, seam_of

Forward = Callable[..., Any]


def attend(seam: Seam, q: Tensor, k: Tensor, v: Tensor, mask: StructuredMask | None, scale: float | None) -> Any:
    """softmax(scale q k^T) v of q, k, v (b n s d) as (b s n*d)."""
    seam.called()
    q, k, v = (x.transpose(1, 2) for x in one_dtype(q, k, v))
    o: Any = vk.attention(q, k, v, mask=None if mask is None else mask.on(q.device), scale=scale)
    return o.flatten(2)


def dense(mask: Any, like: Tensor) -> Any:
    """What a stock forward adds to scores (b 1 queries keys) in place of a structured mask."""
    if not isinstance(mask, StructuredMask):
        return mask
    seen = mask.dense()[:, None].to(like.device).expand(like.shape[0], *mask.shape[1:])
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, torch.finfo(like.dtype).min)


def _dropout(module: Any, *names: str) -> str | None:
    """A sentence where attention weights are dropped out in training."""
    if not module.training:
        return None
    for found in (getattr(module, name, 0.0) for name in names):
        p = found.p if isinstance(found, torch.nn.Dropout) else found
        if p:
            return f"attention dropout of {p}"
    return None


# ---- LLaMA, and what was written after it


def llama(stock: Forward, rotate: Forward, seam: Seam) -> Forward:
    """A decoder's self-attention with its own rotary tables; `rotate` is its function for them, or ours.

    `pretraining_tp` slices a projection and adds the slices up: the same product, taken whole here.
    """
    none_means_all = reads_softmax(stock)  # the plain form adds the mask it is given; SDPA and flash imply causal
    stock_takes = set(host.parameters(stock))

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
        position_embeddings: Any = None,
        **rest: Any,
    ) -> tuple[Tensor, None, Any]:
        if output_attentions:
            raise ValueError(weights_refused(type(self).__name__))
        reason = _dropout(self, "attention_dropout")
        if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
            reason = "a dense mask is given"
        if reason is not None:
            seam.left_to_stock(reason)
            given: dict[str, Any] = dict(position_ids=position_ids, past_key_value=past_key_value, use_cache=use_cache)
            given |= dict(cache_position=cache_position, position_embeddings=position_embeddings)
            given = {name: x for name, x in given.items() if name in stock_takes}
            return stock(self, hidden_states, attention_mask=dense(attention_mask, hidden_states), **given, **rest)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        tables = _tables(self, v, position_ids, past_key_value, position_embeddings)
        q, k = rotate(q, k, *tables)
        if hasattr(past_key_value, "update"):
            told = {"cos": tables[0], "sin": tables[1], "cache_position": cache_position}
            k, v = past_key_value.update(k, v, self.layer_idx, told)
        elif not hasattr(self, "layer_idx"):
            if past_key_value is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
            past_key_value = (k, v) if use_cache else None
        mask = attention_mask
        if isinstance(mask, Tensor):
            mask = masks.once(masks.of_padding, mask, q.shape[2], k.shape[2])
        elif mask is None and not none_means_all:
            mask = masks.structured(q.shape[2], k.shape[2], None, q.device)
        o = attend(seam, q, k, v, mask, None)
        return self.o_proj(o), None, past_key_value

    return forward


def _tables(module: Any, v: Tensor, position_ids: Any, past: Any, given: Any) -> tuple[Any, ...]:
    """cos, sin, and the positions to look up where the tables are of all positions: what `rotate` takes after q, k."""
    if given is not None:
        return tuple(given)
    if "position_ids" in host.parameters(type(module.rotary_emb).forward):
        return tuple(module.rotary_emb(v, position_ids))
    length = v.shape[2]
    if hasattr(past, "get_usable_length"):
        length += past.get_usable_length(length, module.layer_idx)
    elif past is not None:
        length += past[0].shape[2]
    return *module.rotary_emb(v, seq_len=length), position_ids


# ---- vision


def clip(stock: Forward, seam: Seam) -> Forward:
    """CLIP's attention of any year before it read a registry; returns (out, None)."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        causal_attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        if output_attentions:
            raise ValueError(weights_refused(type(self).__name__))
        masked = attention_mask is not None or causal_attention_mask is not None
        reason = "a dense mask is given" if masked else _dropout(self, "dropout")
        if reason is not None:
            seam.left_to_stock(reason)
            return stock(self, hidden_states, attention_mask, causal_attention_mask)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projections)
        return self.out_proj(attend(seam, q, k, v, None, self.scale)), None

    return forward


def eva(stock: Forward, seam: Seam) -> Forward:
    """The EVA ViT of BLIP-2 and of what was built on it: one matrix for q, k, v, biases for q and v alone."""

    def forward(self: Any, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        relative = rel_pos_bias is not None or self.relative_position_bias_table is not None
        reason = "a relative position bias is given" if relative else _dropout(self, "attn_drop")
        if reason is not None:
            seam.left_to_stock(reason)
            return stock(self, x, rel_pos_bias)
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = torch.nn.functional.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj_drop(self.proj(attend(seam, q, k, v, None, self.scale)))

    return forward


def qformer(stock: Forward, seam: Seam) -> Forward:
    """The Q-Former's self- and cross-attention, BERT's form; returns (out, (keys, values))."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Any]:
        if output_attentions:
            raise ValueError(weights_refused(type(self).__name__))
        crosses = encoder_hidden_states is not None
        mask = encoder_attention_mask if crosses else attention_mask
        reason = _dropout(self, "dropout") or _unlike_bert(self, mask, head_mask)
        if reason is not None:
            seam.left_to_stock(reason)
            rest = (encoder_hidden_states, encoder_attention_mask, past_key_value)
            return stock(self, hidden_states, attention_mask, head_mask, *rest)
        source = encoder_hidden_states if crosses else hidden_states
        split = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            project(x).unflatten(-1, split).transpose(1, 2)
            for project, x in ((self.query, hidden_states), (self.key, source), (self.value, source))
        )
        if past_key_value is not None and not crosses:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
        seen = None if mask is None else masks.once(masks.visible, mask, q.shape[2])
        return attend(seam, q, k, v, seen, None), (k, v)

    return forward


def _unlike_bert(module: Any, mask: Tensor | None, head_mask: Any) -> str | None:
    if head_mask is not None:
        return "head_mask is given"
    if module.position_embedding_type != "absolute":
        return f"positions are {module.position_embedding_type}"
    if getattr(module, "save_attention", False):
        return "the attention map is to be saved"
    return None if mask is None or mask.shape[1:3] == (1, 1) else "a dense mask is given"


# ---- a dictionary of attention functions (4.48 and later)


class Served(dict):  # type: ignore[type-arg]
    """What `ALL_ATTENTION_FUNCTIONS` means in one module's forward: ours under every key."""

    def __getitem__(self, key: str) -> Forward:
        return served(super().__getitem__(key))


@lru_cache(maxsize=16)
def served(stock: Forward) -> Forward:
    """An attention function of that dictionary: ours where it can, else `stock`, counted."""

    def function(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Any, None]:
        seam = seam_of(module, "attention")
        reason = why_stock(query, key, value, attention_mask, given.get("dropout", 0.0), given)
        if reason is None:
            return attention_forward(module, query, key, value, attention_mask, **given)
        if seam is not None:
            seam.left_to_stock(reason)
        return stock(module, query, key, value, dense(attention_mask, query), **given)

    return function
