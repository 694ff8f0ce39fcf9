"""What flash-attn's functions are told, read once: which keys a query sees, and what has no kernel here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.check import require
from vkernels.compat.intervals import NO_LIMIT, Band


def refuse_unsupported(op: str, dropout_p: float = 0.0, softcap: float = 0.0, alibi_slopes: Any = None) -> None:
    """The arguments that change the result and have no kernel: named, never ignored."""
    require(dropout_p == 0.0, op, "dropout_p", "be 0, there is no dropout kernel", dropout_p, NotImplementedError)
    require(softcap == 0.0, op, "softcap", "be 0, there is no softcap kernel", softcap, NotImplementedError)
    got = "slopes"
    require(alibi_slopes is None, op, "alibi_slopes", "be None, there is no ALiBi kernel", got, NotImplementedError)


def band(op: str, causal: bool, window_size: tuple[int, int]) -> Band:
    """flash-attn's alignment: the last query stands at the last key. A causal window has no right side."""
    good = len(window_size) == 2 and all(isinstance(side, int) and side >= NO_LIMIT for side in window_size)
    require(good, op, "window_size", "be two integers of at least -1", window_size)
    left, right = window_size
    return Band(left, 0 if causal else right)


def check_starts(op: str, name: str, starts: Tensor, total: int) -> None:
    """Cumulative lengths; their values are looked at only where that costs nothing."""
    good = isinstance(starts, Tensor) and starts.dim() == 1 and starts.dtype in (torch.int32, torch.int64)
    got = f"{starts.dtype} {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
    require(good and len(starts) >= 1, op, name, "be int32 (batch + 1)", got, TypeError)
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        ascending = bool((starts.diff() >= 0).all()) and int(starts[0]) == 0 and int(starts[-1]) <= total
        require(ascending, op, name, f"start at 0, never decrease and end within {total} tokens", starts.tolist()[:8])
