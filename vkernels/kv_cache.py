"""KVCache: keys and values of the past, at full precision or as 8, 4 or 2 bit codes (docs/kv-cache.md)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from vkernels.check import FLOATS, refusal, require
from vkernels.remember import Form

BITS = {"int8": 8, "int4": 4, "int2": 2}
FULL = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS = (32, 64, 128)
STORAGE = (
    "k_rows", "v_rows", "k_codes", "k_scale", "v_codes", "v_scale", "k_recent", "v_recent", "k_sink", "v_sink",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the token at a position lives. `bits` is 0 for full precision; `ring` is 0 where nothing is dropped."""

    bits: int
    group: int
    residual: int
    sinks: int
    page: int
    ring: int

    def ints(self) -> list[int]:
        return [self.bits, self.group, self.residual, self.sinks, self.page, self.ring]

    def history(self, length: int) -> tuple[int, int]:
        """First and one-past-last history index kept once `length` tokens came; 0 is the first after the sinks."""
        end = max(length - self.sinks, 0)
        if self.bits:
            end = max(end - self.residual, 0) // self.group * self.group
        return (max(end - self.ring, 0) if self.ring else 0), end

    def slot(self, index: int) -> int:
        return index % self.ring if self.ring else index


_FORMED = frozenset((*STORAGE, "table", "layout"))  # what makes the form of a cache, the last of it set at the end


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return (count * bits + 31) // 32


def on_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    """int32 tensor of `numbers`, without waiting for the device: equal ones are filled in there, others are copied from
    pinned memory."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=torch.int32, device=device)
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=pinned).to(device, non_blocking=pinned)


class KVCache:
    """Keys and values of `b` sequences, appended at the end, read by `decode_attention`.

    Full-precision schemes keep every token. Quantised ones (KIVI) keep the first `sinks` and at least the newest
    `residual` tokens in `dtype`; older tokens become codes `group` at a time: keys per channel over the tokens of the
    group, values per token over groups of channels, ``q = clip(round((x - z) / delta), 0, 2^bits - 1)``. A group is
    coded once, from the values that came in, so appending token by token and in bulk give the same bits.

    Args:
        scheme:   "bf16", "fp16", "fp32", "int8", "int4", "int2"
        b, m, d:  sequences, key/value heads, head size
        capacity: tokens a sequence may hold; with ring=True tokens of history kept (a multiple of group if quantised)
        group:    32, 64 or 128 tokens (keys) or channels (values) share one scale; ignored at full precision
        residual: newest tokens kept in `dtype`, a multiple of group; None means 128
        sinks:    oldest tokens kept in `dtype` and never dropped
        page:     tokens of a page, a multiple of group if quantised; None stores each sequence in one piece
        pages:    pages of the pool the sequences share; None means enough for all of them
        ring:     a new token beyond the capacity drops the oldest (a group at a time if quantised), sinks excepted
        dtype:    what comes in and what is kept uncoded; full-precision schemes fix it
        device:   where the storage lives
    Raises:
        ValueError, TypeError, ShapeError
    Example:
        >>> cache = KVCache("int4", b=1, m=8, d=128, capacity=4096)
        >>> cache.append(k, v)                          # k, v (b s m d)
        >>> decode_attention(q, cache)                  # q (b s n d), the newest s tokens
    Source: KIVI, arXiv:2402.02750.
    """

    k_rows: torch.Tensor | None  # pages m page d
    v_rows: torch.Tensor | None
    k_codes: torch.Tensor | None  # pages m page/group words(d) group
    k_scale: torch.Tensor | None  # pages m page/group 2 d: delta, zero
    v_codes: torch.Tensor | None  # pages m page/group words(group) d (rounded up to 16)
    v_scale: torch.Tensor | None  # pages m page/group 2 d/group group: delta, zero
    k_recent: torch.Tensor | None  # b m residual+group d, history index modulo its length
    v_recent: torch.Tensor | None
    k_sink: torch.Tensor | None  # b m sinks d
    v_sink: torch.Tensor | None
    _form: Form | None = None
    _counted: tuple[list[int], torch.Tensor] | None = None

    def __init__(
        self,
        scheme: str,
        *,
        b: int,
        m: int,
        d: int,
        capacity: int,
        group: int = 64,
        residual: int | None = None,
        sinks: int = 0,
        page: int | None = None,
        pages: int | None = None,
        ring: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        op = "KVCache"
        require(scheme in BITS or scheme in FULL, op, "scheme", f"be one of {', '.join([*FULL, *BITS])}", repr(scheme))
        bits = BITS.get(scheme, 0)
        for name, size in (("b", b), ("m", m), ("d", d), ("capacity", capacity)):
            require(isinstance(size, int) and size >= 1, op, name, "be an integer of at least 1", size)
        require(d % 8 == 0 and d <= 256, op, "d", "be a multiple of 8 up to 256", d)
        require(isinstance(sinks, int) and sinks >= 0, op, "sinks", "be an integer of at least 0", sinks)
        require(capacity + sinks < 2**31, op, "capacity", "be below 2^31", capacity)
        require(not (ring and page), op, "page", "be None for a ring, which is stored in one piece", page)
        if bits:
            require(group in GROUPS, op, "group", f"be one of {', '.join(map(str, GROUPS))}", group)
            residual = 128 if residual is None else residual
            ok = isinstance(residual, int) and residual >= 0 and residual % group == 0
            require(ok, op, "residual", f"be a multiple of group ({group})", residual)
            require(dtype in (*FLOATS, torch.float64), op, "dtype", "be a float dtype", dtype, TypeError)
            multiple = f"be a positive multiple of group ({group}) for {scheme}"
            require(not ring or capacity % group == 0, op, "capacity", f"{multiple} in a ring", capacity)
        else:
            require(not residual, op, "residual", f"be None or 0 for {scheme}, which codes nothing", residual)
            require(ring or sinks == 0, op, "sinks", f"be 0 for {scheme} without a ring, which drops nothing", sinks)
            residual, group, dtype = 0, 1, FULL[scheme]
            multiple = "be at least 1"
        require(page is None or (page > 0 and page % group == 0), op, "page", multiple, page)
        require(pages is None or (page is not None and pages >= 1), op, "pages", "come with page, at least 1", pages)

        self.scheme, self.b, self.m, self.d, self.capacity = scheme, b, m, d, capacity
        self.group, self.residual, self.sinks, self.ring, self.dtype = group, residual, sinks, ring, dtype
        self.paged, self.bits = page is not None, bits
        rounded = -(-capacity // group) * group
        self.page = page if page is not None else rounded
        self.layout = Layout(bits, group, residual, sinks, self.page, capacity if ring else 0)
        per_sequence = -(-rounded // self.page)
        self.pages = b * per_sequence if pages is None else pages
        self._lengths = [0] * b
        self._free = list(range(self.pages))[::-1] if self.paged else []
        self._pages = [[] if self.paged else [i] for i in range(b)]  # the table, where the host can read it
        self.lengths = torch.zeros(b, dtype=torch.int32, device=device)
        self.device = self.lengths.device  # as tensors name it: cuda:0, where the caller said cuda
        self.table = torch.full((b, per_sequence), -1, dtype=torch.int32, device=device)
        if not self.paged:
            self.table.copy_(torch.arange(b, dtype=torch.int32)[:, None])
        self._allocate()

    def _allocate(self) -> None:
        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        for name in STORAGE:
            setattr(self, name, None)
        b, m, d, g = self.b, self.m, self.d, self.group
        if not self.bits:
            self.k_rows, self.v_rows = (empty(self.pages, m, self.page, d) for _ in "kv")
        else:
            head = (self.pages, m, self.page // g)
            self.k_codes = empty(*head, words(d, self.bits), g, dtype=torch.int32)
            self.k_scale = empty(*head, 2, d, dtype=torch.float16)
            self.v_codes = empty(*head, words(g, self.bits), -(-d // 16) * 16, dtype=torch.int32)
            self.v_scale = empty(*head, 2, -(-d // g), g, dtype=torch.float16)
            self.k_recent, self.v_recent = (empty(b, m, self.residual + g, d) for _ in "kv")
        if self.sinks:
            self.k_sink, self.v_sink = (empty(b, m, self.sinks, d) for _ in "kv")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _FORMED:
            object.__setattr__(self, "_form", None)

    def __repr__(self) -> str:
        kind = "paged" if self.paged else "ring" if self.ring else "contiguous"
        return (
            f"KVCache({self.scheme!r}, b={self.b}, m={self.m}, d={self.d}, capacity={self.capacity}, {kind}, "
            f"lengths={self._lengths}, {self.bytes / 2**20:.1f} MiB)"
        )

    # ---- what is in it ---------------------------------------------------------------------------------------------

    def length(self, sequence: int | None = None) -> int:
        """Tokens that came in so far, dropped ones included. None: of the longest sequence."""
        return max(self._lengths) if sequence is None else self._lengths[sequence]

    @property
    def bytes(self) -> int:
        """Memory of the storage, whatever is in it."""
        return sum(t.numel() * t.element_size() for t in [*self.tensors(), self.table, self.lengths] if t is not None)

    def storage(self, name: str) -> torch.Tensor:
        """A tensor of the storage this scheme has."""
        tensor = getattr(self, name)
        assert tensor is not None, f"{self.scheme} stores no {name}"
        return tensor

    def tensors(self) -> list[torch.Tensor | None]:
        """The storage in the order of STORAGE, which is the order of the registered operators."""
        return [getattr(self, name) for name in STORAGE]

    @property
    def form(self) -> Form:
        """What the storage looks like, for `remembered` decisions."""
        if self._form is None:
            sizes = (self.b, self.m, self.d, self.dtype, self.device, self.paged)
            self._form = Form(*sizes, self.layout.ints(), self.table, self.tensors())
        return self._form

    def place(self, sequence: int, index: int) -> tuple[int, int]:
        """Page, and row in it, of a history index."""
        slot = self.layout.slot(index)
        return self._pages[sequence][slot // self.page], slot % self.page

    def positions(self, sequence: int) -> list[int]:
        """Positions of the tokens still held, ascending."""
        length = self._lengths[sequence]
        first, _ = self.layout.history(length)
        return [*range(min(length, self.sinks)), *range(first + self.sinks, length)]

    def dequantised(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values still held (b s m d) in the order of `positions`, shorter sequences padded with zeros."""
        from vkernels.ops.decode_attention.reference import dequantised

        dtype = dtype or self.dtype
        rows = [dequantised(self, i, dtype) for i in range(self.b)]
        longest = max(k.shape[0] for k, _ in rows)
        k, v = (torch.zeros(self.b, longest, self.m, self.d, dtype=dtype, device=self.device) for _ in "kv")
        for i, (ki, vi) in enumerate(rows):
            k[i, : len(ki)], v[i, : len(vi)] = ki, vi
        return k, v

    # ---- changing it -----------------------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor, *, count: Any = None, backend: str | None = None) -> KVCache:
        """Add tokens at the end; see `kv_append`."""
        from vkernels.ops.kv_append import kv_append

        return kv_append(self, k, v, count=count, backend=backend)

    def refuse_overflow(self, op: str, counts: list[int]) -> None:
        """Raise where `counts` more tokens do not fit."""
        if not self.ring:
            end = max([length + count for length, count in zip(self._lengths, counts, strict=True)])
            if end > self.capacity:
                raise ValueError(refusal(op, "k", f"fit the capacity ({self.capacity} tokens)", f"{end} tokens"))
        if self.paged:
            need = [self._pages_needed(i, count) for i, count in enumerate(counts)]
            rule = f"fit the {len(self._free)} free pages of the pool"
            require(sum(need) <= len(self._free), op, "k", rule, f"{sum(need)} more pages")

    def _pages_needed(self, sequence: int, count: int) -> int:
        _, end = self.layout.history(self._lengths[sequence] + count)
        return max(-(-end // self.page) - len(self._pages[sequence]), 0)

    def reserve(self, count: int | list[int]) -> None:
        """Give `count` more tokens their pages; appending does this itself."""
        counts = [count] * self.b if isinstance(count, int) else count
        self.refuse_overflow("KVCache.reserve", counts)
        if self.paged:
            self._take_pages(counts)

    def _take_pages(self, counts: list[int]) -> None:
        for i, c in enumerate(counts):
            for _ in range(self._pages_needed(i, c)):
                page = self._free.pop()
                self.table[i, len(self._pages[i])] = page
                self._pages[i].append(page)

    def counts_on_device(self, counts: list[int]) -> torch.Tensor:
        """int32 tensor of `counts`. Those of the last call are kept, because a decoder appends one token at a time."""
        if self._counted is not None and self._counted[0] == counts:
            return self._counted[1]
        made = on_device(counts, self.device)
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # else filled by replays only
            self._counted = list(counts), made
        return made

    def advance(self, count: int | list[int]) -> None:
        """Say that `count` tokens were written: for kernels that write rows of the storage themselves."""
        counts = [count] * self.b if isinstance(count, int) else count
        self._lengths = [n + c for n, c in zip(self._lengths, counts, strict=True)]
        self.lengths = on_device(self._lengths, self.device)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (b count m d) of the storage where the next `count` tokens belong: write them, then `advance(count)`.

        Only where those rows exist and lie in one piece: a full-precision scheme, not paged, sequences of equal
        length, and in a ring only up to its end.
        """
        op = "KVCache.rows"
        require(self.bits == 0, op, "scheme", "be of full precision", self.scheme)
        require(not self.paged, op, "cache", "not be paged", self)
        require(len(set(self._lengths)) == 1, op, "cache", "hold sequences of equal length", self._lengths)
        self.refuse_overflow(op, [count] * self.b)
        at = self._lengths[0] - self.sinks
        require(at >= 0, op, "cache", f"hold its {self.sinks} sinks already", f"length {self._lengths[0]}")
        at = self.layout.slot(at)
        require(at + count <= self.page, op, "count", "stay before the end of the ring", count)
        k, v = (self._part(self.storage(name), at, count) for name in ("k_rows", "v_rows"))
        return k, v

    def _part(self, x: torch.Tensor, at: int, count: int) -> torch.Tensor:
        """x[:, :, at : at + count] as (b count m d), in one step: decoders ask for it at every layer."""
        sample, head, token, channel = x.stride()
        shape, strides = (x.shape[0], count, self.m, self.d), (sample, token, head, channel)
        return x.as_strided(shape, strides, x.storage_offset() + at * token)

    def reset(self) -> KVCache:
        """Forget every token; the storage stays."""
        self._lengths = [0] * self.b
        self.lengths = torch.zeros_like(self.lengths)
        if self.paged:
            self.table.fill_(-1)
            self._free, self._pages = list(range(self.pages))[::-1], [[] for _ in range(self.b)]
        return self

    def clone(self) -> KVCache:
        """An independent copy."""
        other = copy.copy(self)
        for name in (*STORAGE, "table", "lengths"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.clone())
        other._lengths, other._free = list(self._lengths), list(self._free)
        other._pages = [list(pages) for pages in self._pages]
        return other

    def reorder(self, index: list[int] | torch.Tensor) -> KVCache:
        """Sequence i becomes a copy of sequence index[i] (beam search). Not for a paged cache: its pool may be full."""
        index = index.tolist() if isinstance(index, torch.Tensor) else list(index)
        ok = len(index) == self.b and all(0 <= i < self.b for i in index)
        require(ok, "KVCache.reorder", "index", f"be {self.b} sequence numbers below {self.b}", index)
        require(not self.paged, "KVCache.reorder", "cache", "not be paged", self)
        at = torch.tensor(index, device=self.device)
        for name in STORAGE:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[at])
        self._lengths = [self._lengths[i] for i in index]
        self.lengths = self.lengths[at]
        return self
