"""apply_rope: the public door."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vkernels.check import bind, require, same_dtype
from vkernels.dispatch import Backend, choose
from vkernels.library import cpu_why_not, op
from vkernels.ops.apply_rope import reference, torch_op  # noqa: F401  (registers the overloads)


@dataclass(frozen=True)
class Call:
    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def prepare(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Call:
    axes = bind("apply_rope", ("x", x, "b s n d"), ("cos", cos, "b|1 s r"), ("sin", sin, "b|1 s r"))
    same_dtype("apply_rope", ("x", x))
    require(axes["d"] == 2 * axes["r"], "apply_rope", "cos", "have one angle per pair", f"r={axes['r']} d={axes['d']}")
    return Call(x, cos, sin)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Rotate queries or keys by their position."""
    call = prepare(x, cos, sin)
    return choose("apply_rope", BACKENDS, backend, call).run(call)


BACKENDS = (
    Backend("cpu", lambda c: cpu_why_not(c.x), lambda c: op("apply_rope", "cpu")(c.x, c.cos, c.sin)),
    Backend("reference", lambda c: None, lambda c: reference.apply_rope(c.x, c.cos, c.sin)),
)
