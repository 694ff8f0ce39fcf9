"""Hugging Face's mask closures, read as intervals of keys: O(tokens) memory, no queries x keys tensor.

transformers describes a mask as a function of (batch, head, query, key) built from a few known pieces. Each piece that
is known here is, for every query, one interval of keys that holds the query itself. Intersections and unions of such
intervals are such intervals again, so any combination of known pieces is a MaskPlan with one range per query; padding
becomes a list of live keys. A piece that is not known is materialised by transformers' own `sdpa_mask`, once per
forward, with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vkernels.masks.lower import _compacted
from vkernels.masks.plan import MaskPlan
from vkernels_video.integrations.transformers import host

FAR = 2**40


class Unknown(Exception):
    """A mask function that is not made of known pieces."""


class StructuredMask:
    """What a mask function hands to the attention function in place of a dense mask: a plan, and what it says.

    It reports the shape a dense mask would have, so that transformers passes it on as a finished 4-D mask.
    """

    ndim = 4

    def __init__(
        self,
        make: Callable[[], MaskPlan],
        shape: tuple[int, int, int, int],
        causal: bool = False,
        window: int | None = None,
        padded: bool = False,
    ):
        self._make, self.shape = make, shape
        self._plan: MaskPlan | None = None
        self.causal, self.window, self.padded = causal, window, padded

    @property
    def plan(self) -> MaskPlan:
        """Made when a layer first asks: a cache of codes never does."""
        if self._plan is None:
            self._plan = self._make()
        return self._plan

    def __repr__(self) -> str:
        words = [word for word, told in (("causal", self.causal), ("padded", self.padded)) if told]
        words += [] if self.window is None else [f"window={self.window}"]
        return f"StructuredMask({', '.join(words) or 'joint'}, {self.shape})"

    def dim(self) -> int:
        return 4

    def contiguous(self) -> StructuredMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> StructuredMask:
        """Itself: its tensors move where a layer needs them."""
        return self

    def on(self, device: torch.device) -> MaskPlan:
        """The plan with its tensors on `device`: layers of one model may live on several."""
        plan = self.plan
        if plan.device == device or (plan.ranges is None and plan.k_rows is None):
            return plan
        moved = {name: getattr(plan, name) for name in ("k_rows", "k_count", "ranges")}
        moved = {name: None if x is None else x.to(device) for name, x in moved.items()}
        return MaskPlan(plan.s_q, plan.s_k, 1, plan.len_q, plan.len_k, **moved)

    def dense(self) -> Tensor:
        """The mask as bool [b, queries, keys], for tests and for what kernels refuse."""
        plan = self.plan
        b, _, s_q, s_k = self.shape
        device = plan.device
        place = torch.arange(s_k, device=device).expand(b, -1)
        live = torch.ones(b, s_k, dtype=torch.bool, device=device)
        if plan.k_rows is not None and plan.k_count is not None:
            order = plan.k_rows.long().expand(b, -1)
            place = torch.empty_like(order).scatter_(1, order, place)
            live = place < plan.k_count.expand(b)[:, None]
        if plan.ranges is None:
            return live[:, None].expand(b, s_q, s_k)
        start, end = plan.ranges.expand(b, -1, -1).unbind(-1)
        return live[:, None] & (place[:, None] >= start[..., None]) & (place[:, None] < end[..., None])


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Any:
    """The mask interface registered under our keys: a StructuredMask, None where nothing is hidden, or a dense mask
    where the function is not known."""
    if isinstance(attention_mask, StructuredMask):
        return attention_mask
    mask_function = mask_function or PIECES["causal_mask_function"]
    device = torch.device(device)
    causal, window = _told(mask_function)
    keep = _kept_keys(attention_mask, kv_length, kv_offset, beyond=causal)
    if _is(mask_function, "bidirectional_mask_function") and keep is None and allow_is_bidirectional_skip:
        return None
    q = torch.arange(q_length, device=device)[None] + q_offset
    try:
        start, end = _interval(mask_function, q)
    except Unknown as unknown:
        return _materialised(
            str(unknown),
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=False,
            device=device,
            **rest | {"allow_is_causal_skip": False},
        )

    def plan() -> MaskPlan:
        return interval_plan(start - kv_offset, end - kv_offset, keep, kv_length)

    return StructuredMask(plan, (batch_size, 1, q_length, kv_length), causal, window, keep is not None)


def interval_plan(start: Tensor, end: Tensor, keep: Tensor | None, kv_length: int) -> MaskPlan:
    """Intervals in key positions, and which keys are live, as kernels eat them."""
    start, end = start.clamp(0, kv_length), end.clamp(0, kv_length)
    s_q = start.shape[1]
    if keep is None:
        ranges = torch.stack([start, torch.maximum(start, end)], -1).to(torch.int32)
        return MaskPlan(s_q, kv_length, 1, s_q, kv_length, ranges=ranges)
    rows, count = _compacted(keep)
    before = torch.nn.functional.pad(keep.cumsum(1), (1, 0))  # live keys below a position
    p = keep.shape[0]
    start, end = (before.gather(1, bound.expand(p, -1)) for bound in (start, torch.maximum(start, end)))
    ranges = torch.stack([start, end], -1).to(torch.int32)
    k_rows, k_count = rows.to(torch.int32), count.to(torch.int32)
    return MaskPlan(s_q, kv_length, 1, s_q, kv_length, k_rows=k_rows, k_count=k_count, ranges=ranges)


@lru_cache(maxsize=16)
def _known_causal(s_q: int, s_k: int, device: torch.device) -> MaskPlan:
    return causal_plan_of(s_q, s_k, device)


def causal_plan_of(s_q: int, s_k: int, device: torch.device) -> MaskPlan:
    end = torch.arange(1, s_q + 1, device=device)[None]
    return interval_plan(torch.zeros_like(end), end, None, s_k)


def causal_plan(s_q: int, s_k: int, device: torch.device) -> MaskPlan:
    """Top-left causal, as SDPA's is_causal: query i sees keys up to i."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return causal_plan_of(s_q, s_k, device)
    return _known_causal(s_q, s_k, device)


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cu_seqlens -> its version, sizes and plan: one for all layers


def packed_plan(cu_q: Tensor, cu_k: Tensor, s_q: int, s_k: int) -> MaskPlan:
    """Sequences laid end to end: each query sees the keys of its own."""
    if torch.compiler.is_compiling() or cu_q is not cu_k or cu_q.is_inference() or torch.is_inference_mode_enabled():
        return _packed_plan(cu_q, cu_k, s_q, s_k)
    known = (cu_q._version, s_q, s_k)
    found = _plans.get(cu_q)
    if found is None or found[0] != known:
        found = _plans[cu_q] = known, _packed_plan(cu_q, cu_k, s_q, s_k)
    return found[1]


def _packed_plan(cu_q: Tensor, cu_k: Tensor, s_q: int, s_k: int) -> MaskPlan:
    """Groups at a stride where all are equally long and that can be seen without waiting for a device; else one range
    per query."""
    if cu_q.device.type == "cpu" and not torch.compiler.is_compiling() and cu_q is cu_k:
        bounds = cu_q.tolist()
        lengths = {b - a for a, b in pairwise(bounds)}
        if len(lengths) == 1 and s_q == bounds[-1] and (each := lengths.pop()) > 0:
            groups = s_q // each
            return MaskPlan(s_q, s_k, groups, each, each, (each, 1), (each, 1))
    token = torch.arange(s_q, device=cu_q.device, dtype=cu_q.dtype)
    own = torch.searchsorted(cu_q[1:].contiguous(), token, right=True).clamp(max=cu_k.shape[0] - 2)
    ranges = torch.stack([cu_k[own], cu_k[own + 1]], -1).clamp(0, s_k)[None].to(torch.int32)
    return MaskPlan(s_q, s_k, 1, s_q, s_k, ranges=ranges)


# ---- reading a mask function


PIECES: dict[str, Callable[..., Any]] = {}  # of transformers.masking_utils; a dict that torch.compile can look into


def learn_pieces() -> None:
    for name in ("causal_mask_function", "bidirectional_mask_function", "sdpa_mask"):
        PIECES[name] = host.attribute("transformers.masking_utils", name)


def _is(function: Callable[..., Any], name: str) -> bool:
    return function is PIECES[name]


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _name(function: Callable[..., Any]) -> str:
    """The builder of a closure of transformers.masking_utils, '' for anything else."""
    if torch.compiler.is_compiling():
        return ""
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return ""
    return getattr(function, "__qualname__", "").split(".<locals>")[0]


def _interval(function: Callable[..., Any], q: Tensor) -> tuple[Tensor, Tensor]:
    """The half-open interval of keys that every query at positions `q` [1 or b, s] sees; it holds the query."""
    if _is(function, "causal_mask_function"):
        return torch.zeros_like(q), q + 1
    if _is(function, "bidirectional_mask_function"):
        return torch.zeros_like(q), torch.full_like(q, FAR)
    name = _name(function)
    if name not in _READERS:  # while compiling no closure can be read
        raise Unknown(
            "a closure" if torch.compiler.is_compiling() else getattr(function, "__qualname__", repr(function))
        )
    return _READERS[name](_cells(function), q)


def _and(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    parts = cells["mask_functions"]
    if not parts:
        raise Unknown("and_masks of nothing")
    start, end = torch.zeros_like(q), torch.full_like(q, FAR)
    packed = any(_name(part) == "packed_sequence_mask_function" for part in parts)
    for part in parts:
        if _name(part) == "remap_positions_for_packed_sequence":
            if not packed:
                raise Unknown("positions remapped without packed sequences")
            part = _shift_invariant(_cells(part)["mask_function"])
        first, last = _interval(part, q)
        start, end = torch.maximum(start, first), torch.minimum(end, last)
    return start, end


def _or(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    parts = cells["mask_functions"]
    if not parts:
        raise Unknown("or_masks of nothing")
    start, end = q, q + 1
    for part in parts:
        first, last = _runs(_cells(part), q) if _name(part) == "blockwise_overlay" else _interval(part, q)
        start, end = torch.minimum(start, first), torch.maximum(end, last)
    return start, end


def _shift_invariant(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` if it depends on differences of positions only: inside a packed sequence, where positions rise by one,
    it may then be read at the token's place in the row instead."""
    if _is(function, "causal_mask_function") or _is(function, "bidirectional_mask_function"):
        return function
    name = _name(function)
    if name in ("and_masks", "or_masks"):
        for part in _cells(function)["mask_functions"]:
            _shift_invariant(part)
        return function
    if name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return function
    raise Unknown(f"packed positions under {name or function!r}")


def _window(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    return q - cells["sliding_window"] + 1, torch.full_like(q, FAR)


def _window_both_ways(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    reach = cells["sliding_window"]
    return q - reach, q + reach + 1


def _chunk(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    size, pad = cells["chunk_size"], cells["left_padding"][:, None].to(q.device)
    start = pad + torch.div(q - pad, size, rounding_mode="floor") * size
    return start, start + size


def _packed(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence numbers never fall (they are a running count), so a sequence is found by bisection."""
    ids = cells["packed_sequence_mask"].to(q.device).contiguous()
    own = ids.gather(1, q.expand(ids.shape[0], -1).clamp(0, ids.shape[1] - 1))
    return torch.searchsorted(ids, own), torch.searchsorted(ids, own, right=True)


def _runs(cells: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    """The run of equal block ids around each query; a negative id is alone. Only where every id is one run, which is
    read back once: blocks in pieces are no interval."""
    ids = cells["block_sequence_ids"].to(q.device)
    p, n = ids.shape
    position = torch.arange(n, device=q.device).expand(p, n)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = (ids[:, 1:] != ids[:, :-1]) | (ids[:, 1:] < 0)
    if n and bool(_in_pieces(ids, begins)):
        raise Unknown("block_sequence_ids whose blocks lie in pieces")
    start = position.masked_fill(~begins, 0).cummax(1).values
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    end = (position + 1).masked_fill(~ends, n).flip(1).cummin(1).values.flip(1)
    at = q.expand(p, -1).clamp(0, max(n - 1, 0))
    return start.gather(1, at), end.gather(1, at)


def _in_pieces(ids: Tensor, begins: Tensor) -> Tensor:
    named = torch.where(begins & (ids >= 0), ids, -1 - torch.arange(ids.shape[1], device=ids.device))
    ordered = named.sort(1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


_READERS: dict[str, Callable[[dict[str, Any], Tensor], tuple[Tensor, Tensor]]] = {
    "and_masks": _and,
    "or_masks": _or,
    "sliding_window_overlay": _window,
    "sliding_window_bidirectional_overlay": _window_both_ways,
    "chunked_overlay": _chunk,
    "packed_sequence_mask_function": _packed,
}


def _told(function: Callable[..., Any]) -> tuple[bool, int | None]:
    """(causal, window) for plain causal and sliding causal masks; anything finer is (False, None)."""
    if _is(function, "causal_mask_function"):
        return True, None
    if _name(function) == "and_masks":
        parts = _cells(function)["mask_functions"]
        windows = [_cells(p)["sliding_window"] for p in parts if _name(p) == "sliding_window_overlay"]
        if len(parts) == 2 and len(windows) == 1 and any(_is(p, "causal_mask_function") for p in parts):
            return True, int(windows[0])
    return False, None


def _kept_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int, beyond: bool) -> Tensor | None:
    """bool [b, kv_length], or None where every key is live (HF reads it back as well; not while compiling). `beyond` is
    what keys past the mask are, the unwritten end of a static cache: a causal mask hides them anyway."""
    if attention_mask is None:
        return None
    keep = attention_mask.bool()
    if (short := kv_length + kv_offset - keep.shape[-1]) > 0:
        keep = torch.nn.functional.pad(keep, (0, short), value=beyond)
    keep = keep[:, kv_offset : kv_offset + kv_length]
    return None if not torch.compiler.is_compiling() and bool(keep.all()) else keep


_warned: set[str] = set()


def _materialised(what: str, **arguments: Any) -> Tensor:
    if what not in _warned and not torch.compiler.is_compiling():
        _warned.add(what)
        warnings.warn(
            f"vkernels does not know the mask function {what}: it is materialised as a dense mask, and attention runs "
            "on torch's SDPA",
            stacklevel=2,
        )
    return PIECES["sdpa_mask"](**arguments)
