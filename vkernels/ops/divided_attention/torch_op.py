"""torch's view of divided_attention: schemas, fakes, native kernels, backward.

`layout` is [t, l, cls, spatial, patch-major, frames per group]. Nothing but q, k and v is saved: the backward computes
the probabilities again, a whole row at a time.
"""

from __future__ import annotations

import torch

from vkernels.library import fresh, lazily, native, op, ref, register, run_cuda, unit_stride, whole_vectors


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q, k, v, scale, layout):
    return _like(q)


def _cpu(q, k, v, scale, layout):
    o = fresh(_like(q))
    native().divided_attention_fwd(ref(unit_stride(q)), ref(unit_stride(k)), ref(unit_stride(v)), ref(o), scale, layout)
    return o


def _scratch(q: torch.Tensor, heads: tuple[int, ...], layout: list[int], stats: bool) -> list[torch.Tensor | None]:
    """float32 memory: what every group leaves for the CLS token it shares, per tensor of so many heads, None where
    there is no such token; before it, if asked, two numbers per query. Native code refuses layouts that make no
    sense."""
    t, l, cls, spatial, _, frames = (max(x, 0) for x in (layout if len(layout) == 6 else [0] * 6))  # noqa: E741
    b, groups = q.shape[0], t // max(frames, 1)
    sequences, length = (groups, cls + frames * l) if spatial else (groups * l, frames)
    part = [q.new_empty((b, n, groups, q.shape[3]), dtype=torch.float32) if cls and spatial else None for n in heads]
    return [q.new_empty((b, sequences, q.shape[2], length, 2), dtype=torch.float32), *part] if stats else part


def _cuda(q, k, v, scale, layout):
    o, scratch = _like(q), _scratch(q, (q.shape[2],), layout, stats=False)
    run_cuda("divided_attention_fwd_cuda", (*map(whole_vectors, (q, k, v)), o, *scratch), scale, layout)
    return o


def _bwd_cuda(grad_o, q, k, v, scale, layout):
    grads = _like(q), _like(k), _like(v)
    scratch = _scratch(q, (q.shape[2], k.shape[2], k.shape[2]), layout, stats=True)
    run_cuda("divided_attention_bwd_cuda", (*map(whole_vectors, (grad_o, q, k, v)), *grads, *scratch), scale, layout)
    return grads


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.layout = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad_o):
    grads = op("divided_attention_bwd", ctx.backend)(grad_o, *ctx.saved_tensors, ctx.scale, ctx.layout)
    return *grads, None, None


def _bwd_fake(grad_o, q, k, v, scale, layout):
    return _like(q), _like(k), _like(v)


def _bwd_cpu(grad_o, q, k, v, scale, layout):
    grads = fresh((_like(q), _like(k), _like(v)))
    inputs = [ref(unit_stride(x)) for x in (grad_o, q, k, v)]
    native().divided_attention_bwd(*inputs, *map(ref, grads), scale, layout)
    return grads


_TRITON = "vkernels.ops.divided_attention.triton"

register(
    "divided_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, float scale, int[] layout) -> Tensor",
    fake=_fake,
    backends={"cpu": _cpu, "cuda": _cuda, "triton": lazily(_TRITON, "forward")},
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "divided_attention_bwd",
    "(Tensor grad_o, Tensor q, Tensor k, Tensor v, float scale, int[] layout) -> (Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    backends={"cpu": _bwd_cpu, "cuda": _bwd_cuda, "triton": lazily(_TRITON, "backward")},
)
