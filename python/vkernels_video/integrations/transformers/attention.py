"""The attention function registered with transformers: what a model hands over, as `vkernels.attention` wants it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels.check import refusal
from vkernels.masks.plan import MaskPlan
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.cache import Codes
from vkernels_video.integrations.transformers.fitting import weights_refused
from vkernels_video.integrations.transformers.masks import (
    StructuredMask,
    causal_plan,
    learn_pieces,
    make_mask,
    packed_plan,
)
from vkernels_video.integrations.transformers.seams import seam_of

PLAIN, VARLEN = "vkernels", "vkernels_flash"
KEYS = (PLAIN, VARLEN)
STOCK: dict[str, Any] = {}  # transformers' own function; a dict that torch.compile can look into


def register() -> tuple[str, str]:
    """Make `vkernels` and `vkernels_flash` known to transformers as attention implementations, with their masks.

    `vkernels` is a plain key, `AutoModel.from_pretrained(..., attn_implementation="vkernels")` takes it. The other has
    "flash" in its name, which is what makes Qwen-like vision towers hand over all windows in one call; transformers
    accepts it after loading only, and `apply` sets it where it helps. Calling twice changes nothing.

    Returns:
        the two keys
    Raises:
        ImportError, MissingSeam: transformers is missing, too old, or has no such registries
    Example:
        >>> vkt.register()
        ('vkernels', 'vkernels_flash')
    """
    attention, mask = host.attention_interface(), host.mask_interface()
    learn_pieces()
    STOCK["sdpa"] = attention["sdpa"]
    for key in KEYS:
        attention.register(key, attention_forward)
        mask.register(key, make_mask)
    return KEYS


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Codes,
    value: Tensor | Codes,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **given: Any,
) -> tuple[Any, None]:
    """softmax(scaling q k^T) v of q [b, n, s, d] as [b, s, n, d]: transformers' contract, on `vkernels.attention`."""
    if given.get("output_attentions"):
        raise ValueError(weights_refused(type(module).__name__))
    seam = seam_of(module, "attention")
    if isinstance(key, Codes):
        if seam is not None:
            seam.called()
        return key.attend(query, attention_mask, scaling), None
    assert isinstance(value, Tensor)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    reason = why_stock(query, key, value, attention_mask, dropout, given)
    if reason is not None:
        if seam is not None:
            seam.left_to_stock(reason)
        return _stock(module, query, key, value, attention_mask, dropout, scaling, is_causal, given), None
    if seam is not None:
        seam.called()
    query, key, value = one_dtype(query, key, value)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] != k.shape[0]:  # learned queries of batch 1 against many samples
        q = q.expand(k.shape[0], -1, -1, -1)
    k, v, plan = _visible(q, k, v, attention_mask, is_causal, given)
    return vk.attention(q, k, v, mask=plan, scale=scaling), None


def _visible(
    q: Tensor, k: Tensor, v: Tensor, mask: StructuredMask | None, is_causal: bool, given: dict[str, Any]
) -> tuple[Tensor, Tensor, MaskPlan | None]:
    """Keys, values and the plan of who sees whom: packed sequences, a structured mask, or SDPA's top-left causal."""
    s_q, s_k = q.shape[1], k.shape[1]
    if (cu_q := given.get("cu_seq_lens_q")) is not None:
        plan = packed_plan(cu_q, given["cu_seq_lens_k"], s_q, s_k)
        return k, v, plan if not is_causal else _causal_inside(plan, s_q, s_k, cu_q.device)
    if mask is not None:
        return k, v, mask.on(q.device)
    if not is_causal or s_q == 1:
        return k, v, None
    if s_k > s_q:  # the unwritten end of a static cache
        k, v = k[:, :s_q], v[:, :s_q]
    return k, v, causal_plan(s_q, k.shape[1], q.device)


def _causal_inside(plan: MaskPlan, s_q: int, s_k: int, device: torch.device) -> MaskPlan:
    token = torch.arange(s_q, device=device)
    if plan.ranges is None:
        start = token // plan.len_q * plan.len_q
    else:
        start = plan.ranges[0, :, 0]
    ranges = torch.stack([start, token + 1], -1)[None].to(torch.int32)
    return MaskPlan(s_q, s_k, 1, s_q, s_k, ranges=ranges)


def why_stock(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, given: dict[str, Any]) -> str | None:
    """A sentence where the call asks for what `vkernels.attention` does not do; None where it does."""
    if dropout:
        return f"attention dropout of {dropout}"
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if given.get(name) is not None:
            return f"{name} is given"
    if v.shape[-1] != q.shape[-1]:
        return f"values of size {v.shape[-1]} beside queries of size {q.shape[-1]}"
    if isinstance(mask, Tensor):
        return "a dense mask is given"
    return None


def _stock(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    given: dict[str, Any],
) -> Tensor:
    """The same call on torch's SDPA, through transformers; packed sequences and structured masks made dense for it."""
    if isinstance(mask, StructuredMask):
        mask = mask.dense()[:, None].to(q.device)
    elif (cu_q := given.get("cu_seq_lens_q")) is not None:
        s_q, s_k = q.shape[2], k.shape[2]
        plan = packed_plan(cu_q, given["cu_seq_lens_k"].clone(), s_q, s_k)
        plan = _causal_inside(plan, s_q, s_k, cu_q.device) if is_causal else plan
        mask = StructuredMask(lambda: plan, (1, 1, s_q, s_k)).dense()[:, None]
    packed = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    rest = {name: x for name, x in given.items() if name not in packed}
    return STOCK["sdpa"](module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **rest)[0]


def one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as autocast would hand them to SDPA."""
    if q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    found = f"{q.dtype}, {k.dtype}, {v.dtype}".replace("torch.", "")
    raise TypeError(refusal("attention", "q, k and v", "have one dtype (or run under torch.autocast)", found))
