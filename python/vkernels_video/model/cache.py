"""A quantised key/value cache in plain PyTorch: the one people write today.

KIVI's scheme (arXiv:2402.02750): keys per channel in groups of tokens, values per token in groups of channels,
asymmetric, two codes per byte at four bits, the newest tokens in full precision. As transformers' QuantizedCache does,
every step dequantises the whole history and concatenates the new tokens; unlike it, history is quantised only once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vkernels_video.model.config import KV_BITS


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes packed along the last axis, scale and zero of groups [... groups size]: min-max over the last axis."""
    zero, top = x.aminmax(dim=-1, keepdim=True)
    scale = ((top - zero) / (2**bits - 1)).to(torch.float16)
    zero = zero.to(torch.float16)
    step = scale.float().clamp_min(1e-30)
    codes = ((x.float() - zero.float()) / step).round().clamp_(0, 2**bits - 1).to(torch.uint8)
    packed = codes[..., 0 :: 8 // bits]
    for i in range(1, 8 // bits):
        packed = packed | (codes[..., i :: 8 // bits] << (bits * i))
    return packed, scale, zero


def dequantise(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise`: [... groups size]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2).to(dtype) * scale.to(dtype) + zero.to(dtype)


class DequantisingCache:
    """Keys and values [b m s d] of one layer."""

    def __init__(self, scheme: str, group: int, residual: int, dequantise: Callable[..., Tensor] = dequantise):
        self.bits, self.group, self.residual, self.dequantise = KV_BITS[scheme], group, residual, dequantise
        self.codes: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.k: Tensor | None = None  # the newest tokens, b m s d
        self.v: Tensor | None = None

    @torch.compiler.disable
    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens in; what the queries of this step attend to."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        if self.codes is None:
            keys, values = self.k, self.v
        else:
            keys, values = self._history()
            keys, values = torch.cat([keys, self.k], dim=2), torch.cat([values, self.v], dim=2)
        self._retire()
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds between steps."""
        stored = [self.k, self.v, *(tensor for part in self.codes or () for tensor in part)]
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    def _retire(self) -> None:
        """Quantise what no longer fits the full-precision window, in whole groups of tokens."""
        old = (self.k.shape[2] - self.residual) // self.group * self.group
        if old <= 0:
            return
        b, m, _, d = self.k.shape
        k = self.k[:, :, :old].view(b, m, -1, self.group, d).transpose(-1, -2)  # b m groups d group
        v = self.v[:, :, :old].reshape(b, m, old, -1, min(self.group, d))  # b m s groups group
        fresh = quantise(k, self.bits), quantise(v, self.bits)
        if self.codes is None:
            self.codes = fresh
        else:
            self.codes = tuple(
                tuple(torch.cat(pair, dim=2) for pair in zip(had, new, strict=True))
                for had, new in zip(self.codes, fresh, strict=True)
            )
        self.k, self.v = self.k[:, :, old:].contiguous(), self.v[:, :, old:].contiguous()

    def _history(self) -> tuple[Tensor, Tensor]:
        k = self.dequantise(*self.codes[0], self.bits, self.k.dtype)  # b m groups d group
        v = self.dequantise(*self.codes[1], self.bits, self.v.dtype)  # b m s groups group
        return k.transpose(-1, -2).flatten(2, 3), v.flatten(-2)
