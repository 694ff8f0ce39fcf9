"""torch's view of qkv_prologue: schemas, fakes, native kernels, backward."""

from __future__ import annotations

import torch

from vkernels.library import fresh, lazily, native, op, ref, register, run_cuda, unit_stride

_REST = (
    "Tensor? bias, Tensor? q_norm, Tensor? k_norm, Tensor? pos, Tensor? axis, Tensor? freq, float scale, float eps, "
    "int[] layout, float norm_offset=0.0"
)  # layout: n, m, d, blocks, offset, post, all_heads; bias and norms float32 or of the dtype of qkv


def _fake(qkv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    n, m, d = layout[:3]
    b, s = qkv.shape[:2]
    return qkv.new_empty(b, s, n, d), qkv.new_empty(b, s, m, d), qkv.new_empty(b, s, m, d)


def _fake_into(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    return qkv.new_empty(*qkv.shape[:2], layout[0], layout[2])


def _fake_bwd(qkv, dq, dk, dv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    sums = [qkv.new_empty(0 if x is None else x.shape[0], dtype=torch.float32) for x in (bias, q_norm, k_norm)]
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), *sums


def _float32(qkv, norm_offset, bias, *norms):
    """bias and norms for kernels that read float32, which refuse what is neither that nor of the dtype of qkv."""
    bias, *widened = (x.float() if x is not None and x.dtype == qkv.dtype else x for x in (bias, *norms))
    return bias, *(x if x is None or not norm_offset else x + norm_offset for x in widened)


def _cpu_into(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    q = fresh(_fake_into(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout))
    vectors = _float32(qkv, norm_offset, bias, q_norm, k_norm)
    tensors = (unit_stride(qkv), *vectors, q, k_out, v_out, pos, axis, freq)
    native().qkv_prologue(*(ref(x) for x in tensors), scale, eps, layout)
    return q


def _cpu(qkv, *rest):
    _, k, v = _fake(qkv, *rest)
    fresh((k, v))
    return _cpu_into(qkv, k, v, *rest), k, v


def _cpu_bwd(qkv, dq, dk, dv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    dqkv = fresh(torch.empty_like(qkv, memory_format=torch.contiguous_format))
    columns = [0 if x is None else x.shape[0] for x in (bias, q_norm, k_norm)]
    partials = torch.zeros(native().QKV_PROLOGUE_PARTIALS, sum(columns))
    sums = torch.empty(sum(columns))
    vectors = _float32(qkv, norm_offset, bias, q_norm, k_norm)
    tensors = (unit_stride(qkv), *vectors, *map(unit_stride, (dq, dk, dv)), pos, axis, freq)
    native().qkv_prologue_bwd(*(ref(x) for x in tensors), scale, eps, layout, ref(dqkv), ref(partials), ref(sums))
    return dqkv, *(x.clone() for x in sums.split(columns))


def _cuda_into(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    q = _fake_into(qkv, k_out, v_out, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout)
    vectors = _float32(qkv, norm_offset, bias, q_norm, k_norm)
    tensors = (unit_stride(qkv), *vectors, q, k_out, v_out, pos, axis, freq)
    run_cuda("qkv_prologue_cuda", tensors, scale, eps, layout)
    return q


def _cuda(qkv, *rest):
    _, k, v = _fake(qkv, *rest)
    return _cuda_into(qkv, k, v, *rest), k, v


def _partial_rows(tokens: int, columns: int) -> int:
    """Over how many shares of the tokens the CUDA kernel sums: blocks for every multiprocessor of a large GPU, and
    more where rows of sums are short. Depends on sizes only, so that sums have one order."""
    return max(min(-(-tokens // 8), max(264, min(1056, (1 << 21) // max(columns, 1)))), 1)


def _cuda_bwd(qkv, dq, dk, dv, bias, q_norm, k_norm, pos, axis, freq, scale, eps, layout, norm_offset=0.0):
    n, m, d, *_, over_all = layout
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    columns = [0 if x is None else heads * d for x, heads in ((bias, n + 2 * m), (q_norm, n), (k_norm, m))]
    tokens = qkv.shape[0] * qkv.shape[1]
    rows = _partial_rows(tokens, sum(columns))
    partials = torch.empty(rows, sum(columns), dtype=torch.float32, device=qkv.device)
    stats = torch.empty(tokens if over_all else 0, 4, dtype=torch.float32, device=qkv.device)
    gradients = map(unit_stride, (dq, dk, dv))
    vectors = _float32(qkv, norm_offset, bias, q_norm, k_norm)
    tensors = (unit_stride(qkv), *vectors, *gradients, pos, axis, freq, dqkv, stats, partials)
    run_cuda("qkv_prologue_bwd_cuda", tensors, scale, eps, layout)
    sums = [x.sum(0) for x in partials.split(columns, 1)]
    if not over_all:
        sums[1:] = [x.view(-1, d).sum(0) if x.numel() else x for x in sums[1:]]
    return dqkv, *sums


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.eps, ctx.layout, ctx.norm_offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk, dv):
    qkv, *rest = ctx.saved_tensors
    run = op("qkv_prologue_bwd", ctx.backend)
    dqkv, *sums = run(qkv, dq, dk, dv, *rest, ctx.scale, ctx.eps, ctx.layout, ctx.norm_offset)
    return dqkv, *(None if x is None else dx.to(x.dtype) for x, dx in zip(rest[:3], sums, strict=True)), *[None] * 7


_TRITON = "vkernels.ops.qkv_prologue.triton"

register(
    "qkv_prologue_bwd",
    f"(Tensor qkv, Tensor dq, Tensor dk, Tensor dv, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    backends={"cpu": _cpu_bwd, "cuda": _cuda_bwd, "triton": lazily(_TRITON, "backward")},
)
register(
    "qkv_prologue",
    f"(Tensor qkv, {_REST}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backends={"cpu": _cpu, "cuda": _cuda, "triton": lazily(_TRITON, "out_of_place")},
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "qkv_prologue_",
    f"(Tensor qkv, Tensor(a!) k_out, Tensor(b!) v_out, {_REST}) -> Tensor",
    fake=_fake_into,
    backends={"cpu": _cpu_into, "cuda": _cuda_into, "triton": lazily(_TRITON, "into")},
)
