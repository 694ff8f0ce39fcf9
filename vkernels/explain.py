"""`vk.explain`: what a call would do, before it does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from vkernels.dispatch import choose, times
from vkernels.masks import VideoMask
from vkernels.roofline import Ceiling, ceiling


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

    @property
    def roofline_s(self) -> float:
        return self.ceiling.time_s(self.flop, self.bytes, self.dtype)

    def __str__(self) -> str:
        lines = [f"{self.op}: backend {self.backend}"]
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  not {name}: {reason or 'it could, but comes later in the order'}")
        lines += [f"  {note}" for note in self.notes]
        intensity = self.flop / self.bytes if self.bytes else 0.0
        bound = "bytes" if self.bytes / self.ceiling.bytes_per_s >= self.roofline_s else "arithmetic"
        how = "measured" if self.ceiling.measured else "stated"
        lines.append(f"  {self.flop / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB, {intensity:.3g} FLOP/B")
        lines.append(f"  at best {self.roofline_s * 1e6:.3g} us on {self.ceiling.machine} ({how}), bound by {bound}")
        return "\n".join(lines)


def explain(
    op: str | Callable[..., Any], *args: Any, machine: str | None = None, backend: str | None = None, **kwargs: Any
) -> Explanation:
    """Say which backend would run this call, why not the others, and what it costs at the least.

    Args:
        op:      a public function of this package, or its name
        args, kwargs: what you would pass to it
        machine: whose ceilings: None or "cpu" measures this CPU; "h200", "h100", "a100", "rtx4090" are stated
        backend: as in the call itself
    Returns:
        Explanation; `print` it, or read its fields
    Raises:
        ValueError on an unknown op or machine; whatever the call itself would refuse
    Example:
        >>> print(vk.explain(vk.attention, q, k, v, mask=vk.VideoMask.frame_causal(grid)))
    """
    from vkernels.spec import all_specs  # evidence is read on request only

    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    specs = {spec.name: spec for spec in all_specs()}
    if name not in specs:
        raise ValueError(f"explain: op must be one of {', '.join(specs)}, got {name!r}")
    spec = specs[name]
    call = spec.prepare(*args, **kwargs)
    chosen = choose(name, spec.backends, backend, call)
    cost = spec.cost(call)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    notes = []
    kind, measured = times(name, spec.backends, call)
    if measured:
        order = ", ".join(f"{backend} {time:.2f}x" for backend, time in sorted(measured.items(), key=lambda x: x[1]))
        notes.append(f"measured on {kind}: {order} of the fastest's time")
    mask: Any = kwargs.get("mask")
    if isinstance(mask, VideoMask):
        notes.append(f"mask: {mask.stats()}".replace("\n", "\n  "))
    return Explanation(
        op=name,
        backend=chosen.name,
        reasons={b.name: b.why_not(call) for b in spec.backends},
        flop=cost.flop,
        bytes=cost.bytes,
        dtype=tensors[0].dtype if tensors else torch.float32,
        ceiling=ceiling(machine),
        notes=tuple(notes),
    )
