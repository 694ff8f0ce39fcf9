"""torch's view of rearrange: operators, fakes, native kernels and backward.

`rearrange_affine` moves by strides. `rearrange_rows` gathers and runs the epilogue; its backward undoes the epilogue
row by row (`rearrange_rows_bwd`) and then runs `rearrange_rows` again with the transposed plan. `rearrange_rows_into`
writes into a tensor that exists (the schema marks it). `rearrange_max_bwd` hands a maximum's gradient to its winners.
"""

from __future__ import annotations

import math

import torch

from vkernels.library import fresh, lasting, lazily, native, op, ref, register, run_cuda, unit_stride

NORMS = {None: 0, "layer": 1, "rms": 2}
REDUCES = {"sum": 0, "max": 1}
SOURCES = 4  # what one call of the Triton and the CUDA kernels takes
WIDEST_NORM = 32768  # channels
WIDEST_CUDA_ROW = 8192  # channels, where the CUDA kernels hold a row whole


def chunks(device: torch.device) -> int:
    """Row chunks with sums of their own for the parameters' gradients. A fixed number, so that sums depend neither on
    the thread count nor on the GPU: enough for the cores of a CPU, and two for every multiprocessor of a large GPU."""
    return 16 if device.type == "cpu" else 256


def row_axes(x: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the row axes of b rows.. c, axes that run on merged."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[1:-1], x.stride()[1:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def _out_rows(ptr: torch.Tensor | None, idx: torch.Tensor) -> int:
    return idx.shape[1] if ptr is None else max(ptr.shape[1] - 1, 0)


def batch(x: list[torch.Tensor], idx: torch.Tensor) -> int:
    sizes = [s.shape[0] for s in x] + [idx.shape[0]]
    return next((size for size in sizes if size != 1), 1)


def rows_results(x: list[torch.Tensor], ptr, idx, with_sum: bool, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, sum), not written yet."""
    shape = (batch(x, idx), _out_rows(ptr, idx), x[0].shape[-1])
    return x[0].new_empty(shape, dtype=dtype), x[0].new_empty(shape if with_sum else (0,))


def _rows_fake(
    x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
    reduce, norm, scale, eps, with_sum, dtype,
):  # fmt: skip
    return rows_results(x, ptr, idx, with_sum, dtype)


def _rows_cpu(
    x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
    reduce, norm, scale, eps, with_sum, dtype,
):  # fmt: skip
    y, total = fresh(rows_results(x, ptr, idx, with_sum, dtype))
    native().rearrange_rows(
        [ref(unit_stride(s)) for s in x], ref(ptr), ref(idx), ref(weight), ref(bias), ref(gate),
        ref(None if residual is None else unit_stride(residual)), ref(norm_weight), ref(norm_bias), None,
        reduce, norm, scale, eps, False, ref(y), ref(total) if with_sum else None,
    )  # fmt: skip
    return y, total


def _into_fake(
    out, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, eps, accumulate
) -> None:
    return None


def _into_cpu(
    out, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, eps, accumulate
) -> None:
    native().rearrange_rows(
        [ref(unit_stride(s)) for s in x], ref(ptr), ref(idx), ref(weight), ref(bias), ref(gate),
        ref(None if residual is None else unit_stride(residual)), ref(norm_weight), ref(norm_bias), ref(rows),
        reduce, norm, scale, eps, accumulate, ref(out), None,
    )  # fmt: skip


def _cuda_inputs(x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias) -> list[torch.Tensor | None]:
    """What the CUDA kernels read: sources filled up to four, the epilogue's vectors as float32."""
    sources = [*map(unit_stride, x), *[None] * (SOURCES - len(x))]
    bias, gate, norm_weight, norm_bias = (
        None if v is None else v.float().contiguous() for v in (bias, gate, norm_weight, norm_bias)
    )
    residual = None if residual is None else unit_stride(residual)
    return [*sources, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias]


def _rows_cuda(
    x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
    reduce, norm, scale, eps, with_sum, dtype,
):  # fmt: skip
    y, total = rows_results(x, ptr, idx, with_sum, dtype)
    inputs = _cuda_inputs(x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias)
    run_cuda("rearrange_rows_cuda", (*inputs, None, y, total if with_sum else None), reduce, norm, scale, eps, False)
    return y, total


def _into_cuda(
    out, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, rows, reduce, norm, scale, eps, accumulate
) -> None:
    inputs = _cuda_inputs(x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias)
    run_cuda("rearrange_rows_cuda", (*inputs, rows, out, None), reduce, norm, scale, eps, accumulate)


def bwd_results(dy: torch.Tensor, x: list[torch.Tensor], gate, scale: float) -> tuple[torch.Tensor, ...]:
    """(du, dv, partial), not written yet; dv is empty where it equals du."""
    apart = gate is not None or scale != 1.0
    partial = x[0].new_empty((chunks(dy.device), 4, dy.shape[-1]), dtype=torch.float32)
    return x[0].new_empty(dy.shape), x[0].new_empty(dy.shape if apart else (0,)), partial


def _rows_bwd_fake(
    dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
):
    return bwd_results(dy, x, gate, scale)


def _rows_bwd_cpu(
    dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
):
    du, dv, partial = fresh(bwd_results(dy, x, gate, scale))
    native().rearrange_rows_bwd(
        [ref(unit_stride(s)) for s in x], ref(ptr), ref(idx), ref(weight), ref(bias), ref(gate),
        ref(None if residual is None else unit_stride(residual)), ref(norm_weight), ref(norm_bias),
        reduce, norm, scale, eps, ref(unit_stride(dy)), ref(None if dsum is None else unit_stride(dsum)),
        ref(du), ref(dv) if dv.dim() == 3 else None, ref(partial),
    )  # fmt: skip
    return du, dv, partial


def _rows_bwd_cuda(
    dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
):
    du, dv, partial = bwd_results(dy, x, gate, scale)
    inputs = _cuda_inputs(x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias)
    gradients = (unit_stride(dy), None if dsum is None else unit_stride(dsum), du, dv if dv.dim() == 3 else None)
    run_cuda("rearrange_rows_bwd_cuda", (*inputs, *gradients, partial), reduce, norm, scale, eps)
    return du, dv, partial


def _max_bwd_fake(dy, x, ptr, idx, t_ptr, t_idx):
    return x.new_empty(x.shape, dtype=torch.float32)


def _max_bwd_cpu(dy, x, ptr, idx, t_ptr, t_idx):
    dx = x.new_zeros(x.shape, dtype=torch.float32)
    native().rearrange_max_bwd(ref(unit_stride(x)), ref(ptr), ref(idx), ref(unit_stride(dy)), ref(dx))
    return dx


def _rows_setup(ctx, inputs, output) -> None:
    (
        x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
        ctx.reduce, ctx.norm, ctx.scale, ctx.eps, ctx.with_sum, _,
    ) = inputs  # fmt: skip
    ctx.sources = len(x)
    plan = map(lasting, (ptr, idx, weight, t_ptr, t_idx, t_weight))
    ctx.save_for_backward(*x, *plan, bias, gate, residual, norm_weight, norm_bias)


def _rows_backward(ctx, dy, dsum):
    saved = ctx.saved_tensors
    x = list(saved[: ctx.sources])
    ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias = saved[ctx.sources :]
    if not ctx.with_sum:
        dsum = None
    scale = ctx.scale
    dbias = dgate = dnorm_weight = dnorm_bias = None
    if bias is not None or gate is not None or ctx.norm:
        du, dv, partial = op("rearrange_rows_bwd", ctx.backend)(
            dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias,
            ctx.reduce, ctx.norm, scale, ctx.eps,
        )  # fmt: skip
        if dv.dim() != 3:
            dv = du
        dbias, dgate, dnorm_weight, dnorm_bias = (
            None if parameter is None else partial[:, i].sum(0).to(parameter.dtype)
            for i, parameter in enumerate((bias, gate, norm_weight, norm_bias))
        )
        scale = 1.0
    else:
        du = dv = dy if dsum is None else dy + dsum.to(dy.dtype)
    dresidual = du.to(residual.dtype) if residual is not None else None
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _sources_gradient(ctx, x, dv, ptr, idx, weight, t_ptr, t_idx, t_weight, scale)
    return (dx, *[None] * 6, dbias, dgate, dresidual, dnorm_weight, dnorm_bias, *[None] * 6)


def _sources_gradient(ctx, x, dv, ptr, idx, weight, t_ptr, t_idx, t_weight, scale):
    if ctx.reduce == REDUCES["max"]:
        flat = x[0].flatten(1, -2).expand(dv.shape[0], -1, -1)
        grad = op("rearrange_max_bwd", ctx.backend)(dv, flat, ptr, idx, t_ptr, t_idx)
        if scale != 1.0:
            grad = grad * scale
        if x[0].shape[0] != grad.shape[0]:
            grad = grad.sum(0, keepdim=True)
        return [grad.to(x[0].dtype).view(x[0].shape)]
    counts = [math.prod(s.shape[1:-1]) for s in x]
    if t_ptr is None:
        from vkernels.rearrangement.plan import transpose_csr

        t_ptr, t_idx, t_weight = transpose_csr(idx, ptr, weight, sum(counts), dv.shape[1])
    gradients, first = [], 0
    for source, count in zip(x, counts, strict=True):
        shared = source.shape[0] != dv.shape[0]
        rows = t_ptr[:, first : first + count + 1]
        grad, _ = op("rearrange_rows", ctx.backend)(
            [dv], rows, t_idx, t_weight, *[None] * 8, REDUCES["sum"], 0, scale, 0.0, False,
            torch.float32 if shared else source.dtype,
        )  # fmt: skip
        if shared:
            grad = grad.sum(0, keepdim=True).to(source.dtype)
        gradients.append(grad.view(source.shape))
        first += count
    return gradients


def _affine_fake(x, axes, sizes, steps, shape):
    return x.new_empty(shape)


def _affine_cpu(x, axes, sizes, steps, shape):
    y = fresh(x.new_empty(shape))
    native().rearrange_affine(ref(x), list(axes), list(sizes), list(steps), ref(y))
    return y


def _affine_cuda(x, axes, sizes, steps, shape):
    y = x.new_empty(shape)
    run_cuda("rearrange_affine_cuda", (x, y), list(axes), list(sizes), list(steps))
    return y


def _affine_setup(ctx, inputs, output) -> None:
    x, ctx.axes, ctx.sizes, ctx.steps, _ = inputs
    ctx.shape = x.shape


def _affine_backward(ctx, dy):
    """The inverse move; a repeated axis is summed first."""
    dy = dy.reshape(ctx.sizes)
    repeated = [i for i, axis in enumerate(ctx.axes) if axis < 0]
    kept = [i for i, axis in enumerate(ctx.axes) if axis >= 0]
    if repeated:
        inner = torch.promote_types(dy.dtype, torch.float32)
        dy = dy.sum(repeated, dtype=inner).to(dy.dtype)
    sizes = [ctx.sizes[i] for i in kept]
    order = sorted(range(len(kept)), key=lambda j: (ctx.axes[kept[j]], -ctx.steps[kept[j]], j))
    # Every factor is an axis of its own now: the inverse takes them in input order.
    dx = op("rearrange_affine", ctx.backend)(
        dy.contiguous(), order, [sizes[j] for j in order], [1] * len(order), list(ctx.shape)
    )
    return dx, None, None, None, None


_TRITON = "vkernels.ops.rearrange.triton"

register(
    "rearrange_affine",
    "(Tensor x, int[] axes, int[] sizes, int[] steps, int[] shape) -> Tensor",
    fake=_affine_fake,
    backends={"cpu": _affine_cpu, "cuda": _affine_cuda, "triton": lazily(f"{_TRITON}_affine", "affine")},
    backward=_affine_backward,
    setup_context=_affine_setup,
)
register(
    "rearrange_rows_bwd",
    "(Tensor dy, Tensor? dsum, Tensor[] x, Tensor? ptr, Tensor idx, Tensor? weight, Tensor? bias, Tensor? gate, "
    "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, int reduce, int norm, float scale, float eps) "
    "-> (Tensor du, Tensor dv, Tensor partial)",
    fake=_rows_bwd_fake,
    backends={"cpu": _rows_bwd_cpu, "cuda": _rows_bwd_cuda, "triton": lazily(f"{_TRITON}_backward", "rows_bwd")},
)
register(
    "rearrange_max_bwd",
    "(Tensor dy, Tensor x, Tensor ptr, Tensor idx, Tensor? t_ptr, Tensor? t_idx) -> Tensor",
    fake=_max_bwd_fake,
    backends={"cpu": _max_bwd_cpu, "triton": lazily(f"{_TRITON}_backward", "max_bwd")},
)
register(
    "rearrange_rows",
    "(Tensor[] x, Tensor? ptr, Tensor idx, Tensor? weight, Tensor? t_ptr, Tensor? t_idx, Tensor? t_weight, "
    "Tensor? bias, Tensor? gate, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, int reduce, int norm, "
    "float scale, float eps, bool with_sum, ScalarType dtype) -> (Tensor y, Tensor sum)",
    fake=_rows_fake,
    backends={"cpu": _rows_cpu, "cuda": _rows_cuda, "triton": lazily(_TRITON, "rows")},
    backward=_rows_backward,
    setup_context=_rows_setup,
)
register(
    "rearrange_rows_into",
    "(Tensor(a!) out, Tensor[] x, Tensor? ptr, Tensor idx, Tensor? weight, Tensor? bias, Tensor? gate, "
    "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor? rows, int reduce, int norm, float scale, "
    "float eps, bool accumulate) -> ()",
    fake=_into_fake,
    backends={"cpu": _into_cpu, "cuda": _into_cuda, "triton": lazily(_TRITON, "rows_into")},
)
