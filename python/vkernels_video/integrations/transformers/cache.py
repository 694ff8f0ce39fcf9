"""A quantised cache for `generate`: layers that keep codes and hand them, not tensors, to the attention function.

The prompt attends to its own keys and values as they came, as KIVI does; every later step attends on the codes with
`decode_attention`, which never builds a dequantised cache. Left padding never enters a layer: each sequence has its own
length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels.check import refusal, require
from vkernels.ops.decode_attention.api import MOST_QUERIES
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.masks import StructuredMask
from vkernels_video.integrations.transformers.seams import Seam

SCHEMES = ("int8", "int4", "int2")
SLACK = 8  # tokens beyond generate's own bound


class Codes:
    """What a layer's `update` returns in place of keys, and of values: the cache that holds them."""

    def __init__(self, cache: vk.KVCache, unpadded: bool, seam: Seam):
        self.cache, self.unpadded, self.seam = cache, unpadded, seam

    def attend(self, query: Tensor, mask: Any, scaling: float | None) -> Any:
        """softmax(scaling q k^T) v of the newest tokens q [b, n, s, d] as [b, s, n, d]."""
        q = query.transpose(1, 2)
        if mask is not None and not isinstance(mask, StructuredMask):
            raise TypeError(refusal("cache", "attention_mask", "be one vkernels knows", "a dense mask"))
        plain = mask is None or (mask.causal and (self.unpadded or not mask.padded))
        if plain and q.shape[1] <= MOST_QUERIES:
            self.seam.called()
            window = None if mask is None else mask.window
            return vk.decode_attention(q, self.cache, scale=scaling, window=window)
        return self._on_all(q, mask, scaling)

    def _on_all(self, q: Tensor, mask: StructuredMask | None, scaling: float | None) -> Any:
        """Another chunk of a long prompt, or a mask with holes: on dequantised keys and values."""
        rule = "be left padding, or none, where a prompt comes in chunks"
        require(not self.unpadded, "cache", "attention_mask", rule, "padding of several lengths")
        self.seam.left_to_stock("dequantised for a chunk of a prompt or a mask with holes")
        k, v = self.cache.dequantised(q.dtype)
        return vk.attention(q, k, v, mask=None if mask is None else mask.on(q.device), scale=scaling)


@lru_cache(maxsize=1)
def _layer_class() -> type:
    mixin = host.attribute("transformers.cache_utils", "CacheLayerMixin")

    class CodesLayer(mixin):  # type: ignore[misc,valid-type]
        """One layer's keys and values as codes."""

        is_sliding = False

        def __init__(self, scheme: str, capacity: int, mask: Tensor | None, seam: Seam):
            super().__init__()
            self.scheme, self.capacity, self.prompt_mask, self.seam = scheme, capacity, mask, seam
            self.codes: vk.KVCache | None = None
            self.seen = 0  # tokens that came in, padding included
            self.pads: list[int] | None = None

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            b, m, _, d = key_states.shape
            place: dict[str, Any] = dict(dtype=key_states.dtype, device=key_states.device)
            self.codes = vk.KVCache(self.scheme, b=b, m=m, d=d, capacity=self.capacity, **place)
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if self.codes is None:
                self.lazy_initialization(key_states, value_states)
            assert self.codes is not None
            k, v = key_states.detach().transpose(1, 2), value_states.detach().transpose(1, 2)
            first, self.seen = self.seen == 0, self.seen + k.shape[1]
            if not first:
                self.codes.append(k, v)
                return (Codes(self.codes, self.pads is not None, self.seam),) * 2
            self.pads = left_pads(self.prompt_mask, k.shape[0], k.shape[1])
            if self.pads is None:
                self.codes.append(k, v)
            else:
                own, pads = torch.arange(k.shape[1], device=k.device), torch.tensor(self.pads, device=k.device)
                at = (own + pads[:, None]).clamp(max=k.shape[1] - 1)[..., None, None]
                k, v = (x.gather(1, at.expand_as(x)) for x in (k, v))
                self.codes.append(k, v, count=[k.shape[1] - pad for pad in self.pads])
            return key_states, value_states

        def get_seq_length(self) -> int:
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.seen + query_length, 0

        def get_max_length(self) -> int:
            return self.capacity

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.codes is not None:
                self.codes.reorder(beam_idx)

        def reset(self) -> None:
            self.seen = 0
            if self.codes is not None:
                self.codes.reset()

        def crop(self, tokens_to_remove: int) -> None:
            raise NotImplementedError(refusal("cache", "generate", "not take tokens back from codes", "crop"))

    return CodesLayer


def left_pads(mask: Tensor | None, batch: int, length: int) -> list[int] | None:
    """Leading zeros of each row of a mask [b, length] that has zeros nowhere else and is not all ones; else None."""
    if mask is None or mask.dim() != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        return None
    keep = mask.bool().repeat_interleave(batch // mask.shape[0], 0)
    rising = bool((keep[:, 1:] >= keep[:, :-1]).all())
    return None if bool(keep.all()) or not rising else (~keep).sum(1).tolist()


def preparing(stock: Callable[..., Any], scheme: str, seam: Seam) -> Callable[..., Any]:
    """`generate`'s choice of a cache, ours where the caller made none."""

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *rest: Any,
    ) -> Any:
        own = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        encoder = self.config.is_encoder_decoder
        if own or encoder or not generation_config.use_cache or generation_config.is_assistant:
            seam.left_to_stock("generate has another cache, none, or an encoder")
            return stock(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *rest)
        made = partial(_layer_class(), scheme, max_cache_length + SLACK, model_kwargs.get("attention_mask"), seam)
        cache = host.attribute("transformers.cache_utils", "Cache")
        model_kwargs["past_key_values"] = cache(layer_class_to_replicate=made)
        return None

    return _prepare_cache_for_generation
