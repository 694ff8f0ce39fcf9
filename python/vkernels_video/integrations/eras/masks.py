"""Who sees whom in a decoder of those years: causal, padding, a cache. O(tokens), no queries x keys tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vkernels.check import require
from vkernels.masks.plan import MaskPlan
from vkernels_video.integrations.transformers.masks import StructuredMask, causal_plan, interval_plan
from vkernels_video.integrations.transformers.seams import Seam


def causal(
    queries: int, keys: int, padding: Tensor | None = None, device: torch.device | str = "cpu"
) -> MaskPlan | None:
    """The mask of `queries` tokens that are the last of `keys`: each sees itself and what comes before it.

    Args:
        queries: tokens of this call
        keys:    tokens of the cache and of this call
        padding: (b keys), 0 or False marks keys nobody sees; it says the device
        device:  of the plan, where there is no padding
    Returns:
        what `vk.attention(mask=...)` takes; None where everything is seen (one query, no padding)
    Raises:
        ValueError: more queries than keys, or a padding of another length
    Example:
        >>> vk.attention(q, k, v, mask=causal(q.shape[1], k.shape[1], padding))
    """
    require(queries <= keys, "causal", "queries", f"be at most the {keys} keys", queries)
    fits = padding is None or (padding.dim() == 2 and padding.shape[1] == keys)
    require(fits, "causal", "padding", f"have shape (b {keys})", None if padding is None else tuple(padding.shape))
    where = torch.device(device) if padding is None else padding.device
    mask = structured(queries, keys, padding, where)
    return None if mask is None else mask.on(where)


def structured(
    queries: int, keys: int, padding: Tensor | None, device: torch.device, at: Tensor | None = None
) -> StructuredMask | None:
    """`causal`, planned when a layer first asks. `at` (queries) are the queries' places among the keys of a static
    cache; padding shorter than the keys goes on as 1, which causality hides."""
    keep = None if padding is None else _kept(padding, keys)
    if at is None and keep is None and queries == 1:
        return None

    def plan() -> MaskPlan:
        if at is None and keep is None and queries == keys:
            return causal_plan(queries, keys, device)
        place = torch.arange(keys - queries, keys, device=device) if at is None else at
        end = place[None].long() + 1
        return interval_plan(torch.zeros_like(end), end, keep, keys)

    b = 1 if padding is None else padding.shape[0]
    return StructuredMask(plan, (b, 1, queries, keys), causal=True, padded=keep is not None)


def _kept(padding: Tensor, keys: int) -> Tensor | None:
    """bool (b keys), or None where all are live: read back, once per forward."""
    keep = padding[:, :keys].bool()
    keep = torch.nn.functional.pad(keep, (0, keys - keep.shape[1]), value=True)
    return None if bool(keep.all()) else keep


def visible(additive: Tensor, queries: int) -> StructuredMask | None:
    """The mask of BERT's form, (b 1 1 keys): 0 is seen, -10,000 or less is not. None where everything is."""
    keep = additive[:, 0, 0] == 0
    if bool(keep.all()):
        return None
    b, keys = keep.shape

    def plan() -> MaskPlan:
        whole = torch.zeros(1, queries, dtype=torch.long, device=keep.device)
        return interval_plan(whole, whole + keys, keep, keys)

    return StructuredMask(plan, (b, 1, queries, keys), padded=True)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a mask tensor -> its version, sizes and what it says


def once(make: Any, mask: Tensor, *sizes: int) -> StructuredMask | None:
    """`make(mask, *sizes)`, read once for all layers that are handed the same tensor."""
    if mask.is_inference() or torch.is_inference_mode_enabled():
        return make(mask, *sizes)
    key = (make, mask._version, sizes)
    found = _known.get(mask)
    if found is None or found[0] != key:
        found = _known[mask] = key, make(mask, *sizes)
    return found[1]


def of_padding(padding: Tensor, queries: int, keys: int) -> StructuredMask | None:
    """What a decoder layer of the flash-attention form is handed: (b keys) of padding, causality understood."""
    return structured(queries, keys, padding, padding.device)


# ---- the methods of models that made dense masks: what replaces them


def decoder_mask(stock: Any, seam: Seam) -> Any:
    """`_prepare_decoder_attention_mask(attention_mask, input_shape, inputs_embeds, past_key_values_length)`."""

    def _prepare_decoder_attention_mask(
        self: Any, attention_mask: Any, input_shape: Any, inputs_embeds: Tensor, past_key_values_length: int
    ) -> Any:
        if attention_mask is not None and attention_mask.dim() != 2:
            seam.left_to_stock("a dense mask is given")
            return stock(self, attention_mask, input_shape, inputs_embeds, past_key_values_length)
        seam.called()
        queries = input_shape[-1]
        return structured(queries, queries + past_key_values_length, attention_mask, inputs_embeds.device)

    return _prepare_decoder_attention_mask


def prepared_mask(stock: Any, seam: Seam) -> Any:
    """`_prepare_4d_causal_attention_mask[_for_sdpa](attention_mask, input_shape, inputs_embeds, past, window)`."""

    def prepare(
        attention_mask: Any,
        input_shape: Any,
        inputs_embeds: Tensor,
        past_key_values_length: int,
        *rest: Any,
        **more: Any,
    ) -> Any:
        dense = attention_mask is not None and attention_mask.dim() != 2
        if dense or any(x is not None for x in (*rest, *more.values())):
            seam.left_to_stock("a dense mask is given")
            return stock(attention_mask, input_shape, inputs_embeds, past_key_values_length, *rest, **more)
        seam.called()
        queries = input_shape[-1]
        return structured(queries, queries + past_key_values_length, attention_mask, inputs_embeds.device)

    return prepare


def updated_mask(stock: Any, seam: Seam) -> Any:
    """`_update_causal_mask(attention_mask, input_tensor, cache_position, past_key_values, output_attentions)`."""

    def _update_causal_mask(
        self: Any,
        attention_mask: Any,
        input_tensor: Tensor,
        cache_position: Tensor,
        past_key_values: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
            seam.left_to_stock("a dense mask is given")
            return stock(self, attention_mask, input_tensor, cache_position, past_key_values, *rest, **more)
        seam.called()
        queries, device = input_tensor.shape[1], input_tensor.device
        if any(kind.__name__ == "StaticCache" for kind in type(past_key_values).__mro__):
            longest = getattr(past_key_values, "get_max_cache_shape", None) or past_key_values.get_max_length
            return structured(queries, int(longest()), attention_mask, device, at=cache_position)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return structured(queries, past + queries, attention_mask, device)

    return _update_causal_mask
