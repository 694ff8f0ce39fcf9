"""Modules of the ops, for models written against torch.nn. Tokens are frame-major, [b cls + t h w, c]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vkernels.check import require
from vkernels.masks import Grid
from vkernels.ops.apply_rope import apply_rope
from vkernels.ops.divided_attention import divided_attention
from vkernels.rope import RopeSpec, rope_positions


class AxisAttention(nn.Module):
    """Self-attention along one axis of a video: packed projection, `divided_attention`, output projection.

    Args:
        width: channels, a multiple of heads
        heads: of width / heads channels
        axis:  "temporal": over the frames of each place; "spatial": within each frame
        cls:   0 or 1 CLS tokens in front. Over space they see every frame and average what they saw; over time they
               see themselves
        bias:  of both projections
    Example:
        >>> AxisAttention(64, 4, "temporal")(torch.randn(2, 32, 64), Grid(8, 2, 2)).shape
        torch.Size([2, 32, 64])
    Source: TimeSformer, arXiv:2102.05095.
    """

    def __init__(self, width: int, heads: int, axis: str, *, cls: int = 0, bias: bool = True):
        super().__init__()
        op = type(self).__name__
        require(heads >= 1 and width % heads == 0, op, "width", f"be a multiple of the {heads} heads", width)
        self.heads, self.axis, self.cls = heads, axis, cls
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.proj(divided_attention(q, k, v, grid, axis=self.axis, cls=self.cls).flatten(2))


class TemporalAttention(AxisAttention):
    """Self-attention over the frames of each place; see `AxisAttention`."""

    def __init__(self, width: int, heads: int, *, cls: int = 0, bias: bool = True):
        super().__init__(width, heads, "temporal", cls=cls, bias=bias)


class SpatialAttention(AxisAttention):
    """Self-attention within each frame; see `AxisAttention`."""

    def __init__(self, width: int, heads: int, *, cls: int = 0, bias: bool = True):
        super().__init__(width, heads, "spatial", cls=cls, bias=bias)


class DividedSpaceTimeAttention(nn.Module):
    """Time, then space, each behind a LayerNorm and with a residual. The CLS takes part in space only.

    Args:
        width, heads, bias: as AxisAttention
        cls:  CLS tokens, 0 or 1
        eps:  of the norms
        zero: start the temporal half as the identity, to put it into a trained image model
    Source: TimeSformer, arXiv:2102.05095; BT-Adapter, arXiv:2309.15785.
    """

    def __init__(
        self, width: int, heads: int, *, cls: int = 1, bias: bool = True, eps: float = 1e-5, zero: bool = False
    ):
        super().__init__()
        self.cls = cls
        self.temporal_norm, self.spatial_norm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.temporal = TemporalAttention(width, heads, cls=cls, bias=bias)
        self.temporal_fc = nn.Linear(width, width)
        self.spatial = SpatialAttention(width, heads, cls=cls, bias=bias)
        if zero:
            nn.init.zeros_(self.temporal_fc.weight)
            nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        step = self.temporal_fc(self.temporal(self.temporal_norm(x), grid))
        if self.cls:
            passes_by = torch.arange(x.shape[1], device=x.device) < self.cls
            step = step.masked_fill(passes_by[:, None], 0.0)
        x = x + step
        return x + self.spatial(self.spatial_norm(x), grid)


class BTAdapterLayer(DividedSpaceTimeAttention):
    """A layer of BT-Adapter's temporal branch: divided attention that starts as the image model's, then its MLP.

    Args:
        width, heads: as AxisAttention
        mlp:          inner channels; None: 4 * width
        activation:   CLIP's x * sigmoid(1.702 x) unless given
    Source: BT-Adapter, arXiv:2309.15785. The whole adapter is `vkernels_video.model.bt_adapter`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp: int | None = None,
        activation: nn.Module | None = None,
        eps: float = 1e-5,
    ):
        super().__init__(width, heads, cls=1, eps=eps, zero=True)
        inner = 4 * width if mlp is None else mlp
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, inner), activation or QuickGELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = super().forward(x, grid)
        return x + self.mlp(self.mlp_norm(x))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class VideoRotaryEmbedding(nn.Module):
    """Rotary positions of text and video, exact, without tables: one kernel call rotates q and k.

    Args:
        spec:      the angles, `RopeSpec.build(...)`, `RopeSpec.recipe(...)` or `RopeSpec.from_hf(config)`
        positions: the kind `rope_positions` knows: "vanilla", "qwen2_vl", "grid3d"...
        options:   of the kind
    Example:
        >>> rope = VideoRotaryEmbedding(RopeSpec.build(128, 1e6, axes="mrope", sections=(16, 24, 24)), "qwen2_vl")
        >>> q, k = rope(q, k, [12, (8, 16, 16), 30])
    """

    def __init__(self, spec: RopeSpec, positions: str = "vanilla", **options: Any):
        super().__init__()
        require(
            isinstance(spec, RopeSpec), "VideoRotaryEmbedding", "spec", "be a RopeSpec", type(spec).__name__, TypeError
        )
        self.spec, self.kind, self.options = spec, positions, options
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def positions(self, parts: Sequence[int | tuple[int, int, int]], start: float, device: torch.device) -> Tensor:
        """[axes, s], of the last sequence asked for kept: layers share it."""
        key = (tuple(parts), start, device)
        if key not in self._known:
            made = rope_positions(self.kind, parts, start=start, device=device, **self.options)
            self._known = {key: made}
        return self._known[key]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        parts: Sequence[int | tuple[int, int, int]] | None = None,
        *,
        pos: Tensor | None = None,
        start: float = 0,
    ) -> tuple[Tensor, Tensor]:
        """q (b s n d), k (b s m d) rotated by `parts` (text lengths and (t h w) of videos), or by positions given."""
        given = (parts is None) != (pos is None)
        require(given, "VideoRotaryEmbedding", "parts", "be given, or pos, not both", "neither or both")
        if pos is None:
            assert parts is not None
            pos = self.positions(parts, start, q.device)
        return apply_rope(q, k, self.spec, pos)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.kind!r}, pairs={self.spec.pairs}"
