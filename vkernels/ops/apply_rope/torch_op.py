"""torch's view of apply_rope: schemas, fakes, native kernels, backward (the rotation by the opposite angle)."""

from __future__ import annotations

import torch

from vkernels.library import fresh, lazily, native, op, ref, register, run_cuda, unit_stride

_ROPE = "Tensor? pos, Tensor? axis, Tensor? freq, Tensor? cos, Tensor? sin, float scale, bool inverse, int[] layout"


def _empty(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q, k, pos, axis, freq, cos, sin, scale, inverse, layout):
    return _empty(q, q), _empty(k, q)


def _run(q, k, q_out, k_out, pos, axis, freq, cos, sin, scale, inverse, layout) -> None:
    native().apply_rope(
        *(ref(x) for x in (q, k, q_out, k_out, pos, axis, freq, cos, sin)), scale, inverse, layout[0], layout[1]
    )


def _cpu(q, k, pos, axis, freq, cos, sin, scale, inverse, layout):
    q_out, k_out = fresh((_empty(q, q), _empty(k, q)))
    q, k, cos, sin = (None if x is None else unit_stride(x) for x in (q, k, cos, sin))
    _run(q, k, q_out, None if k is None else k_out, pos, axis, freq, cos, sin, scale, inverse, layout)
    return q_out, k_out


def _cpu_in_place(q, k, pos, axis, freq, cos, sin, scale, inverse, layout) -> None:
    _run(q, k, q, k, pos, axis, freq, cos, sin, scale, inverse, layout)


def _cuda(q, k, pos, axis, freq, cos, sin, scale, inverse, layout):
    q_out, k_out = _empty(q, q), _empty(k, q)
    q, k, cos, sin = (None if x is None else unit_stride(x) for x in (q, k, cos, sin))
    tensors = (q, k, q_out, None if k is None else k_out, pos, axis, freq, cos, sin)
    run_cuda("apply_rope_cuda", tensors, scale, inverse, *layout)
    return q_out, k_out


def _cuda_in_place(q, k, pos, axis, freq, cos, sin, scale, inverse, layout) -> None:
    run_cuda("apply_rope_cuda", (q, k, q, k, pos, axis, freq, cos, sin), scale, inverse, *layout)


def _setup_context(ctx, inputs, output) -> None:
    _, k, pos, axis, freq, cos, sin, ctx.scale, ctx.inverse, ctx.layout = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(pos, axis, freq, cos, sin)


def _backward(ctx, dq, dk):
    *angles, sin = ctx.saved_tensors
    if sin is not None and sin.dim() == 4:
        sin = sin.flip(2)  # the transposed matrix: each member takes what the other gave
    dq, dk = op("apply_rope", ctx.backend)(
        dq, dk if ctx.has_k else None, *angles, sin, ctx.scale, not ctx.inverse, ctx.layout
    )
    return dq, (dk if ctx.has_k else None), *[None] * 8


_TRITON = "vkernels.ops.apply_rope.triton"

register(
    "apply_rope",
    f"(Tensor q, Tensor? k, {_ROPE}) -> (Tensor, Tensor)",
    fake=_fake,
    backends={"cpu": _cpu, "cuda": _cuda, "triton": lazily(_TRITON, "out_of_place")},
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "apply_rope_",
    f"(Tensor(a!) q, Tensor(b!)? k, {_ROPE}) -> ()",
    fake=lambda *args: None,
    backends={"cpu": _cpu_in_place, "cuda": _cuda_in_place, "triton": lazily(_TRITON, "in_place")},
)
