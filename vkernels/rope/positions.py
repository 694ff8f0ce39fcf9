"""Positions `[axes, s]` of the schemes that differ only in them. Built on the device from host sizes, no sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vkernels.check import require


def _grid(t: int, h: int, w: int, device: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """[3, t h w]: frame, row, column of every token, frame-major."""
    return torch.stack(
        torch.meshgrid(*(torch.arange(x, device=device, dtype=dtype) for x in (t, h, w)), indexing="ij")
    ).flatten(1)


def _vanilla(start: float, t: int, h: int, w: int, device: Any) -> tuple[torch.Tensor, float]:
    return (start + torch.arange(t * h * w, device=device)).expand(1, -1), start + t * h * w


def _qwen2_vl(start: float, t: int, h: int, w: int, device: Any) -> tuple[torch.Tensor, float]:
    return start + _grid(t, h, w, device), start + max(h, w)


def _qwen2_5_vl(
    start: float,
    t: int,
    h: int,
    w: int,
    device: Any,
    tokens_per_second: float = 2,
    second_per_grid: float = 1.0,
    truncate: bool = False,
) -> tuple[torch.Tensor, float]:
    grid = _grid(t, h, w, device, torch.float64)
    seconds = grid[0] * tokens_per_second * second_per_grid
    time = seconds.floor() if truncate or float(tokens_per_second * second_per_grid).is_integer() else seconds
    pos = torch.stack([time, grid[1], grid[2]]) + start
    integral = truncate or float(tokens_per_second * second_per_grid).is_integer()
    return pos.to(torch.int64) if integral and float(start).is_integer() else pos, start + max(h, w)


def _qwen3_vl(start: float, t: int, h: int, w: int, device: Any) -> tuple[torch.Tensor, float]:
    require(t == 1, "rope_positions", "t", "be 1 for qwen3_vl (each frame is its own block between timestamps)", t)
    return _qwen2_vl(start, 1, h, w, device)


def _videorope(start: float, t: int, h: int, w: int, device: Any, delta: float = 2.0) -> tuple[torch.Tensor, float]:
    grid = _grid(t, h, w, device, torch.float64)
    time = start + delta * grid[0]
    pos = torch.stack([time, time + grid[1] - (h - 1) // 2, time + grid[2] - (w - 1) // 2])
    return pos, start + delta * (t - 1) + 1


def _v2pe(start: float, t: int, h: int, w: int, device: Any, delta: float = 1 / 16) -> tuple[torch.Tensor, float]:
    n = t * h * w
    pos = start + delta * torch.arange(n, device=device, dtype=torch.float64)
    last = start + delta * (n - 1)
    return pos.expand(1, -1), -(-last // 1) + 1


def _tad(start: float, t: int, h: int, w: int, device: Any) -> tuple[torch.Tensor, float]:
    n = t * h * w
    order = torch.arange(n, device=device)
    return (start + order + order // (h * w)).expand(1, -1), start + n


_VISUAL: dict[str, Callable[..., tuple[torch.Tensor, float]]] = {
    "vanilla": _vanilla,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "videorope": _videorope,
    "hope": _videorope,
    "v2pe": _v2pe,
    "tad": _tad,
}
_ONE_AXIS = ("vanilla", "v2pe", "tad")
KINDS = (*_VISUAL, "grid2d", "grid3d")


def rope_positions(
    kind: str,
    parts: Sequence[int | tuple[int, int, int]],
    *,
    start: float = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> torch.Tensor:
    """Positions of a sequence of text runs and videos.

    Args:
        kind: one of `vanilla qwen2_vl qwen2_5_vl qwen3_vl videorope hope v2pe tad grid2d grid3d`.
        parts: an int is so many text tokens, `(t, h, w)` a video of t x h x w tokens (after merging), frame-major.
            `grid2d` and `grid3d` take videos only and give (h, w) and (t, h, w), restarting with each.
        start: position of the first token.
        options: of the kind: `delta` (videorope, hope, v2pe); `tokens_per_second`, `second_per_grid`, `truncate`
            (qwen2_5_vl).

    Returns:
        `[axes, s]`, int64 where every position is whole, else float64.

    Example:
        >>> rope_positions("qwen2_vl", [2, (1, 2, 2), 1])
        tensor([[0, 1, 2, 2, 2, 2, 4],
                [0, 1, 2, 2, 3, 3, 4],
                [0, 1, 2, 3, 2, 3, 4]])

    Source: docs/rope.md.
    """
    op = "rope_positions"
    require(kind in KINDS, op, "kind", f"be one of {', '.join(KINDS)}", repr(kind))
    for part in parts:
        sizes = (part,) if isinstance(part, int) else tuple(part)
        good = len(sizes) in (1, 3) and all(isinstance(x, int) and x >= 0 for x in sizes)
        require(good, op, "parts", "hold text lengths and (t, h, w), none of them negative", part)
    for name, value in (("start", start), *options.items()):
        require(math.isfinite(value), op, name, "be finite", value)
    if kind in ("grid2d", "grid3d"):
        videos = [p for p in parts if not isinstance(p, int)]
        require(len(videos) == len(parts), op, "parts", f"be videos only for {kind}", list(parts))
        return torch.cat([_grid(t, h, w, device)[1 if kind == "grid2d" else 0 :] for t, h, w in videos], dim=1)
    axes = 1 if kind in _ONE_AXIS else 3
    at = start
    pieces = [torch.empty(axes, 0, dtype=torch.int64, device=device)]
    for part in parts:
        if isinstance(part, int):
            pieces.append((at + torch.arange(part, device=device)).expand(axes, -1))
            at += part
        else:
            piece, at = _VISUAL[kind](at, *part, device, **options)
            pieces.append(piece)
    real = any(piece.is_floating_point() for piece in pieces)
    return torch.cat([piece.to(torch.float64 if real else torch.int64) for piece in pieces], dim=1)
