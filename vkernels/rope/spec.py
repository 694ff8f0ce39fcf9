"""RopeSpec: the rotation of every pair as a value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch

from vkernels.check import require
from vkernels.rope import axes as axis_maps
from vkernels.rope import frequencies, hf
from vkernels.rope.recipes import RECIPES

_TWO_PI = Fraction(6283185307179586476925286766559005768394338798750211641949889, 10**60)
LAYOUTS = ("half", "pair", "axial")


@dataclass(frozen=True)
class RopeSpec:
    """Pair j of a head turns by `freq[j] * pos[axis[j]]` radians and is scaled by `scale`.

    Args:
        freq: radians per unit of position, one per pair, in [0, 2 pi); 0 leaves the pair where it is.
        axis: row of `pos` per pair, -1 for none; or one such tuple per kv head (MHRoPE).
        scale: attention scale m; q and k are both multiplied by it.
        layout: "half" pairs (j, j + r), "pair" (2j, 2j + 1), "axial" is "half" inside each half of the rotary part.
        offset: first rotated element of a head; elements outside `[offset, offset + 2 r)` are copied.
        freq_fp32: the frequencies as Hugging Face's float32 arithmetic gives them, for `angle="hf_fp32"`.

    Source: the schemes are listed with theirs in docs/rope.md.
    """

    freq: tuple[float, ...]
    axis: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()
    scale: float = 1.0
    layout: str = "half"
    offset: int = 0
    freq_fp32: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    axis_rows: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    n_axes: int = field(init=False, repr=False, compare=False)
    turns: tuple[int, ...] = field(init=False, repr=False, compare=False)  # freq / 2 pi * 2^64, as signed bits
    _hash: int = field(init=False, repr=False, compare=False)  # counted once: a spec is looked up at every call

    def __post_init__(self) -> None:
        op = "RopeSpec"
        object.__setattr__(self, "freq", tuple(float(f) for f in self.freq))
        if not self.axis:
            object.__setattr__(self, "axis", (0,) * len(self.freq))
        nested = bool(self.axis) and isinstance(self.axis[0], tuple)
        object.__setattr__(self, "axis_rows", self.axis if nested else (self.axis,))
        object.__setattr__(self, "n_axes", 1 + max((a for row in self.axis_rows for a in row if a >= 0), default=0))
        require(self.layout in LAYOUTS, op, "layout", f"be one of {', '.join(LAYOUTS)}", repr(self.layout))
        require(all(0 <= f < 2 * math.pi for f in self.freq), op, "freq", "lie in [0, 2 pi)", self.freq)
        require(len(self.freq) <= 1024, op, "freq", "have at most 1024 pairs", len(self.freq))
        require(self.offset >= 0, op, "offset", "not be negative", self.offset)
        for row in self.axis_rows:
            require(len(row) == len(self.freq), op, "axis", f"name an axis for {len(self.freq)} pairs", len(row))
            require(all(-1 <= a < 4 for a in row), op, "axis", "lie in -1..3", row)
        bits = [round(Fraction(f) / _TWO_PI * 2**64) for f in self.freq]
        object.__setattr__(self, "turns", tuple(x - 2**64 if x >= 2**63 else x for x in bits))
        even = self.layout != "axial" or len(self.freq) % 2 == 0
        require(even, op, "freq", "have an even number of pairs with layout 'axial'", len(self.freq))
        object.__setattr__(
            self, "_hash", hash((self.freq, self.axis, self.scale, self.offset))
        )  # same in every process

    def __hash__(self) -> int:
        return self._hash

    @property
    def pairs(self) -> int:
        return len(self.freq)

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.freq)

    @property
    def blocks(self) -> int:
        """What kernels take for `layout`: 0 neighbours are a pair, else "half" inside each of so many parts."""
        return {"pair": 0, "half": 1, "axial": 2}[self.layout]

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(axis int32 [heads, r], turns int64 [r]: freq / 2 pi * 2^64 as bits), cached per device."""
        if torch.compiler.is_compiling():
            return _make_tables(self, device)
        return _cached_tables(self, device)

    def float32_tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(axis int32 [r], freq float32 [r]) as Hugging Face multiplies them; a pair that no axis turns has freq 0."""
        if torch.compiler.is_compiling():
            return _make_float32_tables(self, self.freq_fp32 or self.freq, device)
        return _cached_float32_tables(self, self.freq_fp32 or self.freq, device)

    def replace(self, **changes: Any) -> RopeSpec:
        if "freq" in changes and "freq_fp32" not in changes:
            changes["freq_fp32"] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; `RopeSpec.from_dict` reads them back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RopeSpec:
        data = dict(data)
        data["freq"] = tuple(data["freq"])
        data["axis"] = tuple(tuple(a) if isinstance(a, list | tuple) else a for a in data["axis"])
        if data.get("freq_fp32") is not None:
            data["freq_fp32"] = tuple(data["freq_fp32"])
        return cls(**data)

    @classmethod
    def build(
        cls,
        d: int,
        base: float = 10000.0,
        scheme: str = "default",
        *,
        axes: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        sections: Sequence[int] | None = None,
        layout: str = "half",
        offset: int = 0,
        **scheme_args: Any,
    ) -> RopeSpec:
        """One spec for a rotary size `d` (partial rotary: the rotated part of the head) by the scheme's name.

        Example:
            >>> RopeSpec.build(128, 1e6, "yarn", factor=4, original=32768, axes="mrope", sections=(16, 24, 24)).n_axes
            3
        """
        op = "RopeSpec.build"
        known = ("default", *frequencies.SCHEMES)
        require(d >= 2 and d % 2 == 0, op, "d", "be even and at least 2", d)
        require(scheme in known, op, "scheme", f"be one of {', '.join(known)}", repr(scheme))
        if scheme == "default":
            exact, scale = frequencies.default(d, base), 1.0
            single = frequencies.default(d, base, torch.float32)
        else:
            function = frequencies.SCHEMES[scheme]
            exact, scale = function(d, base, **scheme_args)  # type: ignore[operator]
            single, _ = function(d, base, **scheme_args, dtype=torch.float32)  # type: ignore[operator]
        require(len(exact) == d // 2, op, "factors", f"have one value for each of {d // 2} pairs", len(exact))
        rows: tuple[Any, ...] = ()
        if isinstance(axes, str):
            require(axes in axis_maps.NAMED, op, "axes", f"be one of {', '.join(axis_maps.NAMED)}", repr(axes))
            require(sections is not None, op, "sections", f"be given with axes={axes!r}", sections)
            rows = axis_maps.NAMED[axes](sections or ())
        elif axes is not None:
            rows = tuple(a if isinstance(a, int) else tuple(a) for a in axes)
        return cls(tuple(exact.tolist()), rows, float(scale), layout, offset, freq_fp32=tuple(single.double().tolist()))

    @classmethod
    def grid(cls, sizes: Sequence[int], base: float = 10000.0, *, layout: str = "half", offset: int = 0) -> RopeSpec:
        """Frequencies restart on every axis: vision towers (`(d/2, d/2)`), Wan (`(44, 42, 42)`), HunyuanVideo
        (`(16, 56, 56)`, base 256). `sizes` are rotated elements per axis; Gemma 4 vision has layout "axial".
        """
        freq: list[float] = []
        single: list[float] = []
        rows: list[int] = []
        for axis, size in enumerate(sizes):
            freq += frequencies.default(size, base).tolist()
            single += frequencies.default(size, base, torch.float32).double().tolist()
            rows += [axis] * (size // 2)
        return cls(tuple(freq), tuple(rows), 1.0, layout, offset, tuple(single))

    @classmethod
    def recipe(cls, name: str, d: int) -> RopeSpec:
        """The grid a model is known by, for heads of `d`: `vit2d ggml_vision gemma4_vision kimi_vision llama4_vision
        minimax_vision` (vision towers) and `wan hunyuan_video cogvideox` (video generators), as in docs/rope.md.

        Example:
            >>> RopeSpec.recipe("minimax_vision", 80).rotary_dim
            78
        """
        op = "RopeSpec.recipe"
        require(name in RECIPES, op, "name", f"be one of {', '.join(RECIPES)}", repr(name))
        known = RECIPES[name]
        sizes = known.sizes(d)
        good = all(size >= 2 and size % 2 == 0 for size in sizes)
        require(good, op, "d", f"give every axis of {name} an even size, at least 2", f"{d} (sizes {sizes})")
        spec = cls.grid(sizes, known.base, layout=known.layout)
        if known.order is None:
            return spec
        order = known.order(spec.pairs)
        single = spec.freq_fp32 or spec.freq
        return spec.replace(
            freq=tuple(spec.freq[j] for j in order),
            axis=tuple(spec.axis_rows[0][j] for j in order),
            freq_fp32=tuple(single[j] for j in order),
        )

    def retimed(self, base: float, original: int, length: int, axis: int = 0) -> RopeSpec:
        """VideoRoPE++: the pairs of `axis` take base b ((L' - 1) / (L0 - 1))^(d / (d - 2)), the others stay."""
        require(original > 1, "RopeSpec.retimed", "original", "be above 1", original)
        require(length > 1, "RopeSpec.retimed", "length", "be above 1", length)
        slow, _ = frequencies.ntk(self.rotary_dim, base, (length - 1) / (original - 1))
        pick = zip(self.axis_rows[0], self.freq, slow.tolist(), strict=True)
        return self.replace(freq=tuple(new if a == axis else old for a, old, new in pick))

    def riflex(self, k: int, length: float, axis: int = 0) -> RopeSpec:
        """RIFLEx: the `k`-th (from 1) frequency of `axis` becomes 0.9 of one turn over `length` frames."""
        pairs = [j for j, a in enumerate(self.axis_rows[0]) if a == axis]
        freq = list(self.freq)
        freq[pairs[k - 1]] = 0.9 * 2 * math.pi / length
        return self.replace(freq=tuple(freq))

    @classmethod
    def from_hf(cls, config: Any, layer_type: str | None = None, length: int | None = None) -> RopeSpec:
        """The spec of a transformers (>= 5) text config: reads `rope_parameters`, flat or nested per layer type.

        Args:
            config: a config, or a multi-modal one that has a text config. Nothing in it is trusted.
            layer_type: which entry, where `rope_parameters` is nested.
            length: the longest sequence to be served: `dynamic` and `longrope` depend on it. The spec is a value and
                never switches by itself when a sequence grows (docs/rope.md).

        Raises:
            ValueError: an unknown `rope_type`, a missing key, or values that contradict each other.
        """
        d, base, scheme, arguments = hf.read(config, layer_type, length)
        return cls.build(d, base, scheme, **arguments)


def _make_tables(spec: RopeSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.tensor(spec.axis_rows, dtype=torch.int32, device=device)
    return axis, torch.tensor(spec.turns, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _cached_tables(spec: RopeSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        return _make_tables(spec, device)


def _make_float32_tables(
    spec: RopeSpec, freq: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.tensor(spec.axis_rows[0], dtype=torch.int32, device=device)
    turned = torch.where(axis < 0, 0.0, torch.tensor(freq, dtype=torch.float32, device=device))
    return axis.clamp(min=0), turned


@lru_cache(maxsize=256)
def _cached_float32_tables(
    spec: RopeSpec, freq: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        return _make_float32_tables(spec, freq, device)
