"""A quantised key/value cache in plain PyTorch: the one people write today.

KIVI's scheme (arXiv:2402.02750): keys per channel in groups of tokens, values per token in groups of channels,
asymmetric, two codes per byte at four bits, the newest tokens in full precision. As transformers' QuantizedCache does,
every step dequantises the whole history and concatenates the new tokens. Two things are `vkernels.KVCache`'s, not
theirs: history is quantised only once (as in KIVI, unlike transformers), and a group that leaves the full-precision
window does so before the step's queries read it, where both attend to it once more in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from vkernels.kv_cache import FULL
from vkernels_video.model.config import KV_BITS

FULL_PRECISION = {dtype: scheme for scheme, dtype in FULL.items()}  # of vkernels.KVCache


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes packed along the last axis, scale and zero of groups [... groups size]: min-max over the last axis.

    Scale and zero are float16, rounded outward so that the codes cover the range.
    """
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    zero = _half(low, up=False)
    scale = _half((high - zero.float()) / (2**bits - 1), up=True)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    codes = ((x.float() - zero.float()) * inverse).round().clamp_(0, 2**bits - 1).to(torch.uint8)
    packed = codes[..., 0 :: 8 // bits]
    for i in range(1, 8 // bits):
        packed = packed | (codes[..., i :: 8 // bits] << (bits * i))
    return packed, scale, zero


def _half(x: Tensor, up: bool) -> Tensor:
    """The float16 next to x on the side asked for."""
    half = x.to(torch.float16)
    beyond = torch.full_like(half, float("inf") if up else -float("inf"))
    wrong = half.float() < x if up else half.float() > x
    return torch.where(wrong, torch.nextafter(half, beyond), half)


def dequantise(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise`: [... groups size]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2).to(dtype) * scale.to(dtype) + zero.to(dtype)


class GrowingCache:
    """Keys and values [b m s d] of one layer as they are, concatenated: transformers' DynamicCache."""

    def __init__(self) -> None:
        self.kv: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens in; what the queries of this step attend to."""
        if self.kv is not None:
            k, v = torch.cat([self.kv[0], k], dim=2), torch.cat([self.kv[1], v], dim=2)
        self.kv = k, v
        return k, v

    def copy(self) -> GrowingCache:
        """Another cache with the same past: every update makes new tensors, so the past itself is shared."""
        return copy(self)

    @property
    def bytes(self) -> int:
        """Bytes the cache holds between steps."""
        return sum(tensor.nbytes for tensor in self.kv or ())


class DequantisingCache:
    """Keys and values [b m s d] of one layer."""

    def __init__(self, scheme: str, group: int, residual: int, dequantise: Callable[..., Tensor] = dequantise):
        self.bits, self.group, self.residual, self.dequantise = KV_BITS[scheme], group, residual, dequantise
        self.k: list[Tensor] = []  # codes, scale, zero of the history: b m groups d group
        self.v: list[Tensor] = []  # the same of the values: b m s groups group
        self.recent: tuple[Tensor, Tensor] | None = None  # the newest tokens in full precision

    @torch.compiler.disable
    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens in; what this step's queries attend to: the prompt as it came, later tokens as stored."""
        if self.recent is None:
            self.recent = self._retire(k, v)
            return k, v
        k, v = torch.cat([self.recent[0], k], dim=2), torch.cat([self.recent[1], v], dim=2)
        self.recent = k, v = self._retire(k, v)
        if self.k:
            old_k, old_v = self.history(k.dtype)
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        return k, v

    def copy(self) -> DequantisingCache:
        """Another cache with the same past: every update makes new tensors, so the past itself is shared."""
        other = copy(self)
        other.k, other.v = list(self.k), list(self.v)
        return other

    @property
    def bytes(self) -> int:
        """Bytes the cache holds between steps."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v, *(self.recent or ())))

    def history(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All quantised tokens, dequantised."""
        k, v = (self.dequantise(*codes, self.bits, dtype) for codes in (self.k, self.v))
        return k.transpose(-1, -2).flatten(2, 3), v.flatten(-2)

    def _retire(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise what no longer fits the full-precision window, in whole groups of tokens; return the rest."""
        b, m, s, d = k.shape
        old = max(0, s - self.residual) // self.group * self.group
        if old:
            groups = k[:, :, :old].reshape(b, m, -1, self.group, d).transpose(-1, -2)
            _append(self.k, quantise(groups, self.bits))
            _append(self.v, quantise(v[:, :, :old].reshape(b, m, old, -1, min(self.group, d)), self.bits))
            k, v = k[:, :, old:].contiguous(), v[:, :, old:].contiguous()
        return k, v


def _append(history: list[Tensor], fresh: tuple[Tensor, ...]) -> None:
    if not history:
        history.extend(fresh)
    else:
        history[:] = [torch.cat(pair, dim=2) for pair in zip(history, fresh, strict=True)]


RowCache = GrowingCache | DequantisingCache
