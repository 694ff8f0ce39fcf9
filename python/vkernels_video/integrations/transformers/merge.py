"""Video rows put into the embeddings: `inputs_embeds.masked_scatter(mask, features)`, written inline in every model.

The call cannot be replaced without owning the forward, but its mask can: it comes from the model's own
`get_placeholder_mask`. Ours returns the same mask as a tensor that knows what a masked_scatter by it means: one pass of
`rearrange` over whole rows, where torch walks the elements one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels.rearrangement import RearrangePlan
from vkernels_video.integrations.transformers.seams import Seam


class Placeholders(Tensor):
    """A mask (b s 1) of the rows that features take. Everything but a masked_scatter by it sees a plain tensor."""

    seam: Seam

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.masked_scatter and not kwargs and isinstance(args[1], cls):
                return merged(*args)
            return func(*args, **(kwargs or {}))


def placeholders(mask: Tensor, seam: Seam) -> Placeholders:
    made = mask.as_subclass(Placeholders)
    made.seam = seam
    return made


def merged(embeds: Tensor, mask: Placeholders, features: Tensor) -> Tensor:
    """embeds (b s c) whose marked rows are those of features, c numbers after c numbers, in order."""
    seam, rows = mask.seam, mask.as_subclass(Tensor)[..., 0].reshape(-1)
    c = embeds.shape[-1]
    reason = _why_stock(embeds, mask, features)
    if reason is not None or features.numel() != int(rows.sum()) * c:
        seam.left_to_stock(reason or "there are more features than placeholders, or fewer")
        return torch.Tensor.masked_scatter(embeds, mask.as_subclass(Tensor), features)
    seam.called()
    n = rows.numel()
    own = torch.arange(n, device=rows.device)
    idx = torch.where(rows, rows.cumsum(0) + (n - 1), own)[None].to(torch.int32)
    plan = RearrangePlan("merge", sources=(n, features.numel() // c), n_out=n, idx=idx)
    out: Any = vk.rearrange([embeds.reshape(1, n, c), features.reshape(1, -1, c)], plan)
    return out.view(embeds.shape)


def _why_stock(embeds: Tensor, mask: Tensor, features: Tensor) -> str | None:
    by_row = mask.shape[:-1] == embeds.shape[:-1] and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    if embeds.dim() != 3 or mask.dim() != 3 or not by_row:
        return "the mask does not mark rows"
    if (features.dtype, features.device) != (embeds.dtype, embeds.device):
        return "features have another dtype or device"
    return None


def marking(module: Any, seam: Seam) -> Any:
    def get_placeholder_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = type(self).get_placeholder_mask(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return found
        if isinstance(found, tuple):
            return tuple(placeholders(mask, seam) for mask in found)
        return placeholders(found, seam)

    return get_placeholder_mask
