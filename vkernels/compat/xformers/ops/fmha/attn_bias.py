"""xformers.ops.fmha.attn_bias: the biases that are masks. Each says its blocks and its band; nothing is materialised.

Constructors, fields and methods are those of xformers 0.0.3x, so that its own objects are read by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from vkernels.check import refusal, require
from vkernels.compat.intervals import NO_LIMIT, Band

Device = torch.device | str | None


def _device(device: Device) -> torch.device:
    """xformers' default: the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _int32(values: Sequence[int], device: Device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=_device(device))


def _lengths(op: str, name: str, lengths: Iterable[int]) -> list[int]:
    require(not isinstance(lengths, Tensor), op, name, "be a list of integers", "a tensor", TypeError)
    values = list(lengths)
    good = all(isinstance(n, int) and n >= 0 for n in values)
    require(good, op, name, "be a list of integers of at least 0", values[:8], TypeError)
    return values


@dataclass
class _SeqLenInfo:
    """A dimension cut into sequences laid end to end."""

    seqstart: Tensor  # int32 (sequences + 1)
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device = None) -> _SeqLenInfo:
        lengths = _lengths("from_seqlens", "seqlens", seqlens)
        starts = [0, *accumulate(lengths)]
        return _SeqLenInfo(_int32(starts, device), max(lengths, default=-1), min(lengths, default=-1), starts)

    def to(self, device: Device) -> Any:
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The sequences of x (1 tokens ...), `batch_sizes` of equal length together."""
        tokens = self.seqstart_py[-1]
        require(tuple(x.shape[:2]) == (1, tokens), "split", "x", f"have shape (1 {tokens} ...)", tuple(x.shape))
        batch_sizes = batch_sizes or [1] * (len(self.seqstart_py) - 1)
        ends = [0, *accumulate(batch_sizes)]
        chunks = [self.seqstart_py[b] - self.seqstart_py[a] for a, b in pairwise(ends)]
        return [y.reshape(b, -1, *y.shape[2:]) for b, y in zip(batch_sizes, x.split(chunks, 1), strict=True)]


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences that each have `padding` places, of which the first `seqlen` are used."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(cls, seqlens: Sequence[int], padding: int, *, device: Device = None) -> _PaddedSeqLenInfo:
        lengths = _lengths("from_seqlens_padded", "seqlens", seqlens)
        require(max(lengths, default=0) <= padding, "from_seqlens_padded", "seqlens", f"fit in {padding}", lengths[:8])
        starts = [i * padding for i in range(len(lengths) + 1)]
        info = _SeqLenInfo(_int32(starts, device), max(lengths, default=-1), min(lengths, default=-1), starts)
        return cls(**vars(info), seqlen=_int32(lengths, device), seqlen_py=lengths, padding=padding)


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    """Sequences anywhere: a start and a length each; the last start is the size of the dimension.

    Of paged keys: starts within each sequence's own pages, `seqlen` is where it ends there, the last start is unused.
    """

    seqlen: Tensor
    seqlen_py: list[int]

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool = False, *, device: Device = None
    ) -> _GappySeqInfo:
        op = "from_seqlens_gappy"
        starts, lengths = _lengths(op, "seqstarts", seqstarts), _lengths(op, "seqlens", seqlens)
        entries = len(lengths) + (not paged)
        require(len(starts) == entries, op, "seqstarts", f"have {entries} entries", len(starts))
        longest, shortest = max(lengths, default=-1), min(lengths, default=-1)
        if paged:
            lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
            starts.append(-1)
        info = _SeqLenInfo(_int32(starts, device), longest, shortest, starts)
        return cls(**vars(info), seqlen=_int32(lengths, device), seqlen_py=lengths)


class AttentionBias:
    """A mask by its structure. `band` says which keys of its sequence a query sees; blocks come from the seqinfos."""

    @staticmethod
    def band(bias: Any) -> Band:
        raise NotImplementedError

    def to(self, device: Device) -> Any:
        """The same bias, its tensors on `device`."""
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, (Tensor, _SeqLenInfo))}
        return replace(self, **moved) if moved else self  # type: ignore[type-var]

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The dense bias of `shape` (... queries keys): 0 where seen, -inf elsewhere. For looking at, not for speed."""
        from vkernels.compat.xformers.ops.fmha.plans import plan_of
        from vkernels.ops.attention.reference import plan_dense

        s_q, s_k = shape[-2:]
        mask = plan_of(self.to(device), s_q, s_k, torch.device(device))
        seen = torch.ones((1, s_q, s_k), dtype=torch.bool) if mask is None else plan_dense(mask, torch.device(device))
        dense = torch.zeros((s_q, s_k), dtype=dtype, device=device).masked_fill(~seen[0].to(device), -torch.inf)
        return dense.expand(*shape)


class LowerTriangularMask(AttentionBias):
    """Causal, counted from the first key."""

    def __init__(self, device: Device = None) -> None:
        pass

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0, bottom_right=False)

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """Refused: there is no kernel for additive biases."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """A name to import and to ask `isinstance` of; making one is refused, there is no kernel for additive biases."""

    def __init__(self, bias: Tensor) -> None:
        rule = "be left out, there is no kernel for additive biases (torch's scaled_dot_product_attention has one)"
        got = f"a bias of {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
        raise NotImplementedError(refusal("LowerTriangularMaskWithTensorBias", "bias", rule, got))


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, the last query at the last key."""

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0)

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal and no more than `_window_size` keys, the last query at the last key."""

    _window_size: int

    def __post_init__(self) -> None:
        _positive(self._window_size)

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(bias._window_size - 1, 0)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Keys within a window around the query's place, the last query at the last key."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        good = self.window_left >= 0 and self.window_right >= 0
        got = (self.window_left, self.window_right)
        require(good, "LocalAttentionFromBottomRightMask", "windows", "be at least 0", got)

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(bias.window_left, bias.window_right)


def _positive(window_size: int) -> None:
    require(window_size > 0, "attn_bias", "window_size", "be at least 1", window_size)


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Sequences laid end to end, each seeing itself."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @staticmethod
    def band(bias: Any) -> Band:
        return Band()

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Device = None
    ) -> Any:
        """Of lengths; the keys' are the queries' unless given."""
        q = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(q, q)
        _as_many(q_seqlen, kv_seqlen)
        return cls(q, _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Of tensors (b_i s_i ...), and these as one tensor (1 tokens ...)."""
        bias = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])], device=tensors[0].device)
        bias._batch_sizes = [x.shape[0] for x in tensors]
        return bias, _end_to_end(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """Of queries, keys and values."""
        _as_many(tensors_q, tensors_k)
        q_lengths, k_lengths = ([x.shape[1] for x in xs for _ in range(x.shape[0])] for xs in (tensors_q, tensors_k))
        bias = cls.from_seqlens(q_lengths, k_lengths, device=tensors_q[0].device)
        bias._batch_sizes = [x.shape[0] for x in tensors_q]
        values = None if tensors_v is None else _end_to_end(tensors_v)
        return bias, _end_to_end(tensors_q), _end_to_end(tensors_k), values

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`from_tensor_list` undone."""
        same = self.q_seqinfo is self.k_seqinfo
        require(same, "split", "bias", "have keys as long as queries (split_queries, split_kv)", "different lengths")
        return self.split_queries(tensor)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


def _as_many(q: Sequence[Any], k: Sequence[Any]) -> None:
    require(len(q) == len(k), "attn_bias", "keys", f"come in {len(q)} sequences like the queries", len(k))


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each sequence causal, counted from its first key."""

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0, bottom_right=False)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each sequence causal, its last query at its last key."""

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """... and no more than `_window_size` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _positive(self._window_size)

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(bias._window_size - 1, 0, bottom_right=False)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """... and no more than `_window_size` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _positive(self._window_size)

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(bias._window_size - 1, 0)


@dataclass
class BlockDiagonalPaddedKeysMask(AttentionBias):
    """Keys in blocks of equal size, of which the first ones count: a padded cache seen by sequences laid end to end."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @staticmethod
    def band(bias: Any) -> Band:
        return Band()

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Device = None,
    ) -> Any:
        """Of the queries' lengths, the room per block, the keys' lengths; causal_diagonal is ignored as in xformers."""
        _as_many(q_seqlen, kv_seqlen)
        keys = _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys)

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)

    def make_paged(self, block_tables: Tensor, page_size: int, paged_type: type) -> Any:
        keys = replace(self.k_seqinfo, padding=block_tables.shape[1] * page_size)
        return paged_type(self.q_seqinfo, keys, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """... causal, the last query at the last key that counts."""

    causal_diagonal: Any = None  # unused, as in xformers

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """... within a window around the query's place."""

    window_left: int
    window_right: int

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(bias.window_left, bias.window_right)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> Any:
        return BlockDiagonalPaddedKeysMask.from_seqlens(q_seqlen, kv_padding, kv_seqlen).make_local_attention(
            window_left, window_right
        )


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """... causal and no more than `_window_size` keys."""

    _window_size: int

    def __post_init__(self) -> None:
        _positive(self._window_size)

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(bias._window_size - 1, 0)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> Any:
        base = BlockDiagonalPaddedKeysMask.from_seqlens(q_seqlen, kv_padding, kv_seqlen)
        return cls(base.q_seqinfo, base.k_seqinfo, window_size)


@dataclass
class PagedBlockDiagonalPaddedKeysMask(AttentionBias):
    """Padded keys whose blocks are rows of pages: keys (1 pages*page_size ...), which are gathered first."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo
    block_tables: Tensor  # int32 (b pages)
    page_size: int

    _unpaged: ClassVar[type[BlockDiagonalPaddedKeysMask]] = BlockDiagonalPaddedKeysMask

    @staticmethod
    def band(bias: Any) -> Band:
        return Band()

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device = None,
    ) -> Any:
        padded = cls._unpaged.from_seqlens(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device=device)
        return cls(padded.q_seqinfo, padded.k_seqinfo, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """... causal, the last query at the last key that counts."""

    _unpaged: ClassVar[type[BlockDiagonalPaddedKeysMask]] = BlockDiagonalCausalWithOffsetPaddedKeysMask

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalGappyKeysMask(AttentionBias):
    """Keys of each sequence anywhere in the dimension."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    @staticmethod
    def band(bias: Any) -> Band:
        return Band()

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqstarts: Sequence[int], kv_seqlen: Sequence[int], *, device: Device = None
    ) -> Any:
        """Of the queries' lengths, the keys' starts (and the size of their dimension) and lengths."""
        _as_many(q_seqlen, kv_seqlen)
        keys = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys)

    def make_paged(
        self, block_tables: Tensor, page_size: int, notional_padding: int, paged_type: type
    ) -> PagedBlockDiagonalGappyKeysMask:
        """These keys, were each sequence's in a block of notional_padding places, as pages."""
        op, starts = "make_paged", self.k_seqinfo.seqstart_py[:-1]
        require(notional_padding % page_size == 0, op, "notional_padding", f"be pages of {page_size}", notional_padding)
        within = [start - i * notional_padding for i, start in enumerate(starts)]
        ends = [start + length for start, length in zip(within, self.k_seqinfo.seqlen_py, strict=True)]
        room = block_tables.shape[1] * page_size
        good = all(start >= 0 and end <= room for start, end in zip(within, ends, strict=True))
        require(good, op, "keys", f"lie within the {room} places of their sequence's pages", f"{within} to {ends}")
        shift = notional_padding * torch.arange(len(starts) + 1, dtype=torch.int32, device=block_tables.device)
        begin = self.k_seqinfo.seqstart - shift
        keys = replace(
            self.k_seqinfo,
            seqstart=begin,
            seqstart_py=[*within, -1],
            seqlen=self.k_seqinfo.seqlen + begin[:-1],
            seqlen_py=ends,
        )
        return paged_type(self.q_seqinfo, keys, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """... causal, the last query at the last key."""

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0)


@dataclass
class PagedBlockDiagonalGappyKeysMask(AttentionBias):
    """Keys of each sequence anywhere in its row of pages, which are gathered first."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo
    block_tables: Tensor  # int32 (b pages)
    page_size: int

    @staticmethod
    def band(bias: Any) -> Band:
        return Band()

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device = None,
    ) -> Any:
        """Of the queries' lengths, the keys' starts within their own pages and their lengths."""
        _as_many(q_seqlen, kv_seqlen)
        device = block_tables.device if device is None else device
        keys = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, paged=True, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """... causal, the last query at the last key."""

    @staticmethod
    def band(bias: Any) -> Band:
        return Band(right=0)


SERVED: dict[str, type[AttentionBias]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type)
    and issubclass(value, AttentionBias)
    and value not in (AttentionBias, LowerTriangularMaskWithTensorBias)
}
__all__ = ["NO_LIMIT", "SERVED", "AttentionBias", "LowerTriangularMaskWithTensorBias", *SERVED]


def __getattr__(name: str) -> Any:
    """A bias of another release of xformers is refused in a sentence, also by `from ... import`."""
    if name.endswith(("Mask", "Bias")):
        rule = f"be one of {', '.join(SERVED)}; vkernels.attention takes any other structure as a VideoMask"
        raise ImportError(refusal("attn_bias", "a bias", rule, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
