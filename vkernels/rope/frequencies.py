"""Frequencies of the one-axis schemes. Each function returns `(theta [r], attention scale)` computed in the given
dtype: float64 for exact angles, float32 in Hugging Face's order of operations for bit parity with its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def default(d: int, base: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    exponent = torch.arange(0, d, 2, dtype=torch.int64).to(dtype) / d
    return 1.0 / (base**exponent)


def linear(d: int, base: float, factor: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, float]:
    """Position interpolation, arXiv:2306.15595."""
    return default(d, base, dtype) / factor, 1.0


def ntk(d: int, base: float, factor: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, float]:
    """NTK-aware base change b' = b s^(d / (d - 2)): the slowest pair is slowed by exactly s."""
    return default(d, base * factor ** (d / (d - 2)), dtype), 1.0


def ntk_vllm(
    d: int, base: float, factor: float, mixed_b: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, float]:
    """The two forms vLLM serves: base b s and theta / s^(2/d), or mixed-base with exponent `mixed_b`."""
    if mixed_b is None:
        return default(d, base * factor, dtype) / factor ** (2 / d), 1.0
    a = math.log(factor) / (d / 2) ** mixed_b
    k = torch.arange(1, d // 2 + 1, dtype=dtype)
    return default(d, base, dtype) / (a * k**mixed_b).exp(), 1.0


def dynamic(
    d: int, base: float, factor: float, original: int, length: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, float]:
    """NTK whose base follows the length L served: b' = b (s L / L0 - (s - 1))^(d / (d - 2))."""
    served = max(length or 0, original)
    return default(d, base * ((factor * served / original) - (factor - 1)) ** (d / (d - 2)), dtype), 1.0


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn(
    d: int,
    base: float,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    attention_factor: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, float]:
    """YaRN, arXiv:2309.00071: pairs that turn often keep their frequency, slow ones are interpolated."""
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_scale(factor)

    def pair_of(rotations: float) -> float:
        return (d * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    powers = base ** (torch.arange(0, d, 2).to(dtype) / d)
    extrapolated, interpolated = 1.0 / powers, 1.0 / (factor * powers)
    keep = 1 - torch.clamp((torch.arange(d // 2, dtype=dtype) - low) / (high - low), 0, 1)
    return interpolated * (1 - keep) + extrapolated * keep, attention_factor


def ntk_by_parts(
    d: int, base: float, factor: float, original: int, dtype: torch.dtype = torch.float64, **ramp: Any
) -> tuple[torch.Tensor, float]:
    """YaRN's ramp without its attention scale."""
    return yarn(d, base, factor, original, attention_factor=1.0, dtype=dtype, **ramp)


def longrope(
    d: int,
    base: float,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original: int,
    factor: float | None = None,
    length: int | None = None,
    attention_factor: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, float]:
    """LongRoPE, arXiv:2402.13753: searched factors, the long ones when `length` exceeds the original window."""
    if attention_factor is None:
        scale = factor or 1.0
        attention_factor = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    chosen = long_factor if length and length > original else short_factor
    stretch = torch.tensor(list(chosen), dtype=dtype)
    exponent = torch.arange(0, d, 2, dtype=torch.int64).to(dtype) / d
    return 1.0 / (stretch * base**exponent), attention_factor


def llama3(
    d: int,
    base: float,
    factor: float,
    original: int = 8192,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, float]:
    """Llama 3.1: by wavelength, keep the short ones, slow the long ones, blend between."""
    theta = default(d, base, dtype)
    wavelength = 2 * math.pi / theta
    low, high = original / low_freq_factor, original / high_freq_factor
    slowed = torch.where(wavelength > low, theta / factor, theta)
    blend = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - blend) * slowed / factor + blend * slowed
    between = ~(wavelength < high) & ~(wavelength > low)
    return torch.where(between, blended, slowed), 1.0


def proportional(
    d: int, base: float, portion: float, factor: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, float]:
    """p-RoPE (Gemma 4): pairs span the whole head, those beyond `portion` do not turn."""
    turning = int(portion * d // 2)
    theta = default(d, base, dtype)
    theta[turning:] = 0
    return theta / factor, 1.0


SCHEMES = {
    "linear": linear,
    "ntk": ntk,
    "ntk_vllm": ntk_vllm,
    "dynamic": dynamic,
    "yarn": yarn,
    "ntk_by_parts": ntk_by_parts,
    "longrope": longrope,
    "llama3": llama3,
    "proportional": proportional,
}
