"""torch's view of apply_rope: schema, fake, CPU kernel, backward (the rotation by the opposite angle)."""

from __future__ import annotations

import torch

from vkernels.library import native, op, ref, register, unit_stride


def _fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cpu(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    native().apply_rope(ref(unit_stride(x)), ref(cos), ref(sin), ref(out))
    return out


def _setup_context(ctx, inputs, output) -> None:
    _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dout):
    cos, sin = ctx.saved_tensors
    return op("apply_rope", ctx.backend)(dout, cos, -sin), None, None


register(
    "apply_rope",
    "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    fake=_fake,
    backends={"cpu": _cpu},
    backward=_backward,
    setup_context=_setup_context,
)
