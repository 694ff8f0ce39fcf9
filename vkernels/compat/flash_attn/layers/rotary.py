"""flash_attn.layers.rotary: rotary embeddings from the caller's tables, one kernel call for q and k."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vkernels.check import bind, require
from vkernels.compat.intervals import in_sequences
from vkernels.ops.apply_rope import apply_rope
from vkernels.rope import RopeSpec


@lru_cache(maxsize=32)
def _spec(rotary: int, interleaved: bool) -> RopeSpec:
    """Which elements turn together; the angles come from the tables."""
    return RopeSpec.build(rotary, layout="pair" if interleaved else "half")


def places(offset: int | Tensor, s: int, still: bool = False) -> Tensor | slice:
    """Where s tokens stand in the tables: offset, offset + 1, ... (1|b s). `still`: all of them at offset."""
    if isinstance(offset, int) and not still:
        return slice(offset, offset + s)
    start = torch.as_tensor(offset).long().reshape(-1, 1)
    return start + torch.arange(s, device=start.device) * (0 if still else 1)


def packed_places(cu_seqlens: Tensor, offsets: int | Tensor, total: int) -> Tensor:
    """Where the tokens of sequences laid end to end stand, (1 total)."""
    token, sequence = in_sequences(cu_seqlens, total)
    place = token - cu_seqlens[:-1].long()[sequence]
    return (place + (offsets.long()[sequence] if isinstance(offsets, Tensor) else offsets))[None]


def _rows(op: str, table: Tensor, at: Tensor | slice) -> Tensor:
    """Rows of a table (positions r): (1|b s r)."""
    rule = f"stay within the {table.shape[0]} rows of cos and sin"
    if isinstance(at, slice):
        require(at.start >= 0 and at.stop <= table.shape[0], op, "seqlen_offsets", rule, f"{at.start}..{at.stop}")
        return table[None, at]
    if at.device.type == "cpu" and at.numel() and not torch.compiler.is_compiling():
        low, high = int(at.min()), int(at.max())
        require(low >= 0 and high < table.shape[0], op, "seqlen_offsets", rule, f"{low}..{high}")
    return table[at]


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Tensor | slice,
    interleaved: bool,
    *,
    k: Tensor | None = None,
    inplace: bool = False,
    op: str = "apply_rotary_emb",
) -> Any:
    """x (b s n d), and k with it, rotated by the tables' rows `at`."""
    bind(op, ("cos", cos, "positions r"), ("sin", sin, "positions r"))
    angle = (_rows(op, cos, at), _rows(op, sin, at))
    return apply_rope(x, k, _spec(2 * cos.shape[1], interleaved), inplace=inplace, angle=angle)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first 2 r elements of every head.

    Args:
        x:              (b s n d), or (tokens n d) with cu_seqlens
        cos, sin:       (positions r), any float dtype
        interleaved:    pairs (0, 1), (2, 3)...; False: (0, r), (1, r + 1)...
        inplace:        x itself is changed and returned
        seqlen_offsets: int or (b): where each sequence starts in the tables
        cu_seqlens:     int32 (b + 1), sequences laid end to end
        max_seqlen:     accepted; lengths are read on the device
    Returns:
        x rotated, same shape
    Raises:
        ShapeError, TypeError, ValueError
    Gradients: x.   Deterministic: yes.
    Example:
        >>> apply_rotary_emb(x, cos, sin).shape
        torch.Size([2, 16, 4, 64])
    Source: flash-attn 2.8.
    """
    op = "apply_rotary_emb"
    if cu_seqlens is None:
        bind(op, ("x", x, "b s n d"))
        out = rotate(x, cos, sin, places(seqlen_offsets, x.shape[1]), interleaved, op=op)
    else:
        bind(op, ("x", x, "tokens n d"))
        out = rotate(x[None], cos, sin, packed_places(cu_seqlens, seqlen_offsets, x.shape[0]), interleaved, op=op)[0]
    return x.copy_(out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed projection in place; see `apply_rotary_emb`.

    Args:
        qkv:            (b s 3 n d), or (b s heads d) with num_heads_q
        cos_k, sin_k:   tables of the keys, where they differ
    Returns:
        qkv
    """
    op = "apply_rotary_emb_qkv_"
    if qkv.dim() == 5:
        bind(op, ("qkv", qkv, "b s 3 n d"))
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        bind(op, ("qkv", qkv, "b s heads d"))
        heads = qkv.shape[2]
        good = num_heads_q is not None and 0 < num_heads_q <= heads and (heads - num_heads_q) % 2 == 0
        require(good, op, "num_heads_q", f"leave as many keys as values of {heads} heads", num_heads_q)
        m = (heads - num_heads_q) // 2  # type: ignore[operator]
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + m]  # type: ignore[operator]
    if cos_k is None and sin_k is None:
        _in_place(q, k, cos, sin, interleaved, seqlen_offsets, op)
    else:
        require(cos_k is not None and sin_k is not None, op, "cos_k", "come with sin_k", "one of them")
        _in_place(q, None, cos, sin, interleaved, seqlen_offsets, op)
        _in_place(k, None, cos_k, sin_k, interleaved, seqlen_offsets, op)  # type: ignore[arg-type]
    return qkv


def _in_place(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, offsets: int | Tensor, op: str
) -> None:
    tracked = torch.is_grad_enabled() and q.requires_grad
    out = rotate(q, cos, sin, places(offsets, q.shape[1]), interleaved, k=k, inplace=not tracked, op=op)
    if tracked:  # autograd follows the copies into the views
        for view, value in zip((q, k), out if k is not None else (out,), strict=False):
            view.copy_(value)  # type: ignore[union-attr]


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate k of kv (b s 2 m d) in place; see `apply_rotary_emb`."""
    op = "apply_rotary_emb_kv_"
    bind(op, ("kv", kv, "b s 2 m d"))
    _in_place(kv[:, :, 0], None, cos, sin, interleaved, seqlen_offsets, op)
    return kv


class RotaryEmbedding(nn.Module):
    """Tables of one frequency ladder, grown as sequences do, applied to packed projections.

    Args:
        dim:         elements rotated, even
        base:        of the frequencies
        interleaved: pairs (0, 1), (2, 3)...; False: (0, r), (1, r + 1)...
        scale_base:  None; xPos has no kernel
        device:      of the frequencies
    Source: flash-attn 2.8, whose tables in the dtype of qkv are kept, as models were trained with them;
        `vkernels.RopeSpec` has exact angles.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        op = "RotaryEmbedding"
        require(
            scale_base is None, op, "scale_base", "be None, there is no xPos kernel", scale_base, NotImplementedError
        )
        require(isinstance(dim, int) and dim >= 2 and dim % 2 == 0, op, "dim", "be even and at least 2", dim)
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        self._tables: tuple[Tensor, Tensor] | None = None

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponent

    def tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (at least `length` positions, r), computed in float32, kept like `like` (dtype, device)."""
        held = self._tables
        stale = (
            held is None or held[0].shape[0] < length or held[0].device != like.device or held[0].dtype != like.dtype
        )
        if stale or (self.training and held is not None and held[0].is_inference()):
            angle = torch.outer(torch.arange(length, device=like.device).float(), self._frequencies(like.device))
            self._tables = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
        assert self._tables is not None
        return self._tables

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv (b s 3 n d) or (b s heads d) with num_heads_q, in place; or q (b s n d) out of place and kv (b s 2 m d)
        in place.

        A seqlen_offset that is a tensor needs max_seqlen, the rows its tables must have.
        """
        if isinstance(seqlen_offset, Tensor):
            require(max_seqlen is not None, "RotaryEmbedding", "max_seqlen", "be given with a tensor of offsets", None)
        length = max_seqlen if max_seqlen is not None else qkv.shape[1] + seqlen_offset
        cos, sin = self.tables(int(length), qkv)  # type: ignore[arg-type]
        options: dict[str, Any] = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, num_heads_q=num_heads_q, **options)
        q = apply_rotary_emb(qkv, cos, sin, **options)
        return q, apply_rotary_emb_kv_(kv, cos, sin, **options)
