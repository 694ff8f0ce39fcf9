"""torch's view of attention: schema, fakes, CPU kernels, backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.library import (
    fresh,
    lasting,
    lazily,
    native,
    op,
    ref,
    register,
    run_cuda,
    unit_stride,
    whole_vectors,
)
from vkernels.masks import MaskPlan

_MASK = (
    "int[] layout, Tensor? q_rows, Tensor? k_rows, Tensor? q_count, Tensor? k_count, Tensor? ranges, "
    "Tensor? q_attr, Tensor? k_attr, int[] bounds, Tensor? q_global, Tensor? k_global"
)


def mask_arguments(plan: MaskPlan | None, s_q: int, s_k: int) -> tuple[Any, ...]:
    """A plan as the schema takes it; layout = groups, len_q, len_k, then the (group, token) strides of q and of k."""
    if plan is None:
        return [1, s_q, s_k, 0, 1, 0, 1], None, None, None, None, None, None, None, [], None, None
    layout = [plan.groups, plan.len_q, plan.len_k, *plan.q_stride, *plan.k_stride]
    box = plan.box
    rest: tuple[Any, ...] = (None, None, [], None, None)
    if box is not None:
        rest = (box.q_attr, box.k_attr, [x for pair in box.bounds for x in pair], box.q_global, box.k_global)
    return layout, plan.q_rows, plan.k_rows, plan.q_count, plan.k_count, plan.ranges, *rest


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, *mask: Any) -> tuple[Tensor, Tensor]:
    b, s_q, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, n, s_q), dtype=torch.float32)


def _fake_bwd(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _native(mask: tuple[Any, ...]) -> list[Any]:
    return [
        ref(x if x.is_contiguous() else x.contiguous()) if isinstance(x, Tensor) else list(x) if x is not None else None
        for x in mask
    ]


def _cpu_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, *mask: Any) -> tuple[Tensor, Tensor]:
    out, lse = fresh(_fake_fwd(q, k, v, scale))
    rows = [ref(unit_stride(x)) for x in (q, k, v)]
    native().attention_forward(*rows, ref(out), ref(lse), scale, *_native(mask))
    return out, lse


def _cpu_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *mask: Any,
) -> tuple[Tensor, ...]:
    grads = fresh(_fake_bwd(dout, dlse, q, k, v))
    rows = [ref(unit_stride(x)) for x in (q, k, v)]
    native().attention_backward(
        ref(unit_stride(dout)),
        ref(dlse),
        *rows,
        ref(out.contiguous()),
        ref(lse.contiguous()),
        *map(ref, grads),
        scale,
        *_native(mask),
    )
    return grads


def _for_cuda(mask: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """The tensors of a mask, and its numbers."""
    tensors = [x.contiguous() if isinstance(x, Tensor) else x for x in (*mask[1:8], *mask[9:])]
    return tensors, [list(mask[0]), list(mask[8])]


def _cuda_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, *mask: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_fwd(q, k, v, scale)
    tensors, numbers = _for_cuda(mask)
    run_cuda("attention_cuda", [*map(whole_vectors, (q, k, v)), out, lse, *tensors], scale, *numbers)
    return out, lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale, layout, *mask = inputs
    ctx.scale, ctx.layout, ctx.bounds = scale, layout, mask.pop(7)
    ctx.save_for_backward(q, k, v, *output, *map(lasting, mask))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 12
    q, k, v, out, lse, *mask = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, *nothing
    dout = torch.zeros_like(out) if dout is None else dout
    mask.insert(7, ctx.bounds)
    grads = op("attention_bwd", ctx.backend)(dout, dlse, q, k, v, out, lse, ctx.scale, ctx.layout, *mask)
    return *grads, *nothing


_TRITON = "vkernels.ops.attention.triton"

register(
    "attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, {_MASK}) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    backends={"cpu": _cpu_bwd, "triton": lazily(_TRITON, "backward")},
)
register(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, float scale, {_MASK}) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    backends={"cpu": _cpu_fwd, "cuda": _cuda_fwd, "triton": lazily(_TRITON, "forward")},
    backward=_backward,
    setup_context=_setup_context,
)
