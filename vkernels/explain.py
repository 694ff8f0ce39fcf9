"""`vk.explain`: what a call would do, before it does it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten

from vkernels.dispatch import choose, times
from vkernels.masks import VideoMask
from vkernels.masks.stats import visible_pairs
from vkernels.roofline import Ceiling, ceiling
from vkernels.tiles import tiles
from vkernels.triton.launch import arch, recording

if TYPE_CHECKING:
    from vkernels.spec import OpSpec

COUNTED_IN_TILES = 16384  # tokens: a mask's tiles are counted pair by pair


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it."""

    op: str
    backend: str
    reasons: dict[str, str | None]  # backend -> why not, None where it can run
    flop: float
    bytes: float
    dtype: torch.dtype
    ceiling: Ceiling
    notes: tuple[str, ...] = ()
    tiles: dict[str, tuple[str, ...]] = field(default_factory=dict)  # backend that can run -> a line for each kernel

    @property
    def roofline_s(self) -> float:
        return self.ceiling.time_s(self.flop, self.bytes, self.dtype)

    def lines(self) -> list[str]:
        """All but the roofline."""
        lines = [f"{self.op}: backend {self.backend}"]
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  not {name}: {reason or 'it could, but comes later in the order'}")
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  tiles of {name}: {line}" for name, kernels in self.tiles.items() for line in kernels]
        intensity = self.flop / self.bytes if self.bytes else 0.0
        return [*lines, f"  {_scaled(self.flop, 'FLOP')}, {_scaled(self.bytes, 'B')}, {intensity:,.3g} FLOP/B"]

    def __str__(self) -> str:
        at, how = self.ceiling, "measured" if self.ceiling.measured else "stated"
        best = f"at best {self.roofline_s * 1e6:.3g} us on {at.machine} ({how})"
        return "\n".join([*self.lines(), f"  {best}, bound by {at.bound(self.flop, self.bytes, self.dtype)}"])


def explain(
    op: str | Callable[..., Any],
    *args: Any,
    machine: str | None = None,
    chip: str | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say which backend would run this call, why not the others, what it is cut to, and what it costs at the least.

    Args:
        op:      a public function of this package, or its name
        args, kwargs: what you would pass to it
        machine: whose ceilings: None or "cpu" measures this CPU; "h200", "h100", "a100", "rtx4090" are stated
        chip:    "sm80", "sm89", "sm90", "sm100": as a GPU of that chip would run the call, with tensors on the CPU in
            the place of its own; None: as the tensors lie
        backend: as in the call itself
    Returns:
        Explanation; `print` it, or read its fields
    Raises:
        ValueError on an unknown op, machine or chip; whatever the call itself would refuse
    Example:
        >>> print(vk.explain(vk.attention, q, k, v, mask=vk.VideoMask.frame_causal(grid)))
    """
    spec = spec_of(op)
    ruled_by = ceiling(machine)
    if chip is not None and not (chip.startswith("sm") and chip[2:].isdecimal() and int(chip[2:]) >= 80):
        raise ValueError(f"explain: chip must be sm80, sm89, sm90 or another from sm80 on, got {chip!r}")
    with contextlib.nullcontext() if chip is None else recording(chip):
        call = spec.prepare(*args, **kwargs)
        reasons = {b.name: b.why_not(call) for b in spec.backends}
        if chip is not None:
            reasons["cpu"] = "the tensors are on cuda, this backend runs on the CPU"
        backends = [b for b in spec.backends if chip is None or b.name != "cpu"]
        chosen = choose(spec.name, backends, backend, call)
        notes = [*_timed(spec, call), *_seen(kwargs.get("mask")), *spec.notes(call)]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    here = chip or (arch(tensors[0].device) if tensors and tensors[0].is_cuda else "interpreter")
    cost = spec.cost(call)
    return Explanation(
        op=spec.name,
        backend=chosen.name,
        reasons=reasons,
        flop=cost.flop,
        bytes=cost.bytes,
        dtype=floats[0].dtype if floats else torch.float32,
        ceiling=ruled_by,
        notes=tuple(notes),
        tiles={b.name: said for b in backends if not reasons[b.name] and (said := tiles(spec.name, b, call, here))},
    )


def _scaled(amount: float, unit: str) -> str:
    scale, prefix = next((x for x in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if amount >= x[0]), (1.0, ""))
    return f"{amount / scale:.3g} {prefix}{unit}"


def spec_of(op: str | Callable[..., Any]) -> OpSpec:
    """The evidence of an op, which is read on request only."""
    from vkernels.spec import all_specs

    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    specs = {spec.name: spec for spec in all_specs()}
    if name not in specs:
        raise ValueError(f"explain: op must be one of {', '.join(specs)}, got {name!r}")
    return specs[name]


def _timed(spec: OpSpec, call: Any) -> list[str]:
    kind, measured = times(spec.name, spec.backends, call)
    order = ", ".join(f"{backend} {time:.2f}x" for backend, time in sorted(measured.items(), key=lambda x: x[1]))
    return [f"measured on {kind}: {order} of the fastest's time"] if measured else []


def _seen(mask: Any) -> list[str]:
    if not isinstance(mask, VideoMask):
        return []
    if mask.tokens <= COUNTED_IN_TILES:
        return [f"mask: {mask.stats()}".replace("\n", "\n  ")]
    visible, samples = visible_pairs(mask.plan("cpu"))
    pairs = mask.tokens**2 * samples
    return [f"mask: {visible:,} of {pairs:,} pairs visible ({visible / pairs:.1%})"]
