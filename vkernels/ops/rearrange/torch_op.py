"""torch's view of rearrange: operators, fakes, CPU kernels and backward.

`rearrange_affine` moves by strides. `rearrange_rows` gathers and runs the epilogue; its backward undoes the epilogue
row by row (`rearrange_rows_bwd`) and then runs `rearrange_rows` again with the transposed plan. `rearrange_rows_into`
writes into a tensor that exists (the schema marks it). `rearrange_max_bwd` hands a maximum's gradient to its winners.
"""

from __future__ import annotations

import math

import torch

from vkernels.library import fresh, lasting, native, op, ref, register, unit_stride

NORMS = {None: 0, "layer": 1, "rms": 2}
REDUCES = {"sum": 0, "max": 1}
CHUNKS = 16  # row chunks with sums of their own; fixed, so that sums do not depend on the thread count


def _out_rows(ptr: torch.Tensor | None, idx: torch.Tensor) -> int:
    return idx.shape[1] if ptr is None else ptr.shape[1] - 1


def _batch(x: list[torch.Tensor], idx: torch.Tensor) -> int:
    sizes = [s.shape[0] for s in x] + [idx.shape[0]]
    return next((size for size in sizes if size != 1), 1)


def _rows_fake(
    x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
    reduce, norm, scale, eps, with_sum, dtype,
):  # fmt: skip
    shape = (_batch(x, idx), _out_rows(ptr, idx), x[0].shape[-1])
    y = x[0].new_empty(shape, dtype=dtype)
    return y, x[0].new_empty(shape if with_sum else (0,))


def _rows_cpu(
    x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
    reduce, norm, scale, eps, with_sum, dtype,
):  # fmt: skip
    y, total = fresh(_rows_fake(
        x, ptr, idx, weight, t_ptr, t_idx, t_weight, bias, gate, residual, norm_weight, norm_bias,
        reduce, norm, scale, eps, with_sum, dtype,
    ))  # fmt: skip
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


def _rows_bwd_fake(
    dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
):
    apart = gate is not None or scale != 1.0
    dv = x[0].new_empty(dy.shape if apart else (0,))
    return x[0].new_empty(dy.shape), dv, x[0].new_empty((CHUNKS, 4, dy.shape[-1]), dtype=torch.float32)


def _rows_bwd_cpu(
    dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
):
    du, dv, partial = fresh(
        _rows_bwd_fake(
            dy, dsum, x, ptr, idx, weight, bias, gate, residual, norm_weight, norm_bias, reduce, norm, scale, eps
        )
    )
    native().rearrange_rows_bwd(
        [ref(unit_stride(s)) for s in x], ref(ptr), ref(idx), ref(weight), ref(bias), ref(gate),
        ref(None if residual is None else unit_stride(residual)), ref(norm_weight), ref(norm_bias),
        reduce, norm, scale, eps, ref(unit_stride(dy)), ref(None if dsum is None else unit_stride(dsum)),
        ref(du), ref(dv) if dv.dim() == 3 else None, ref(partial),
    )  # fmt: skip
    return du, dv, partial


def _max_bwd_fake(dy, x, ptr, idx):
    return x.new_empty(x.shape, dtype=torch.float32)


def _max_bwd_cpu(dy, x, ptr, idx):
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
        sums = partial.sum(0)
        dbias, dgate = (s if p is not None else None for p, s in ((bias, sums[0]), (gate, sums[1])))
        dnorm_weight, dnorm_bias = (
            s if p is not None else None for p, s in ((norm_weight, sums[2]), (norm_bias, sums[3]))
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
        grad = op("rearrange_max_bwd", ctx.backend)(dv, flat, ptr, idx) * scale
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


register(
    "rearrange_affine",
    "(Tensor x, int[] axes, int[] sizes, int[] steps, int[] shape) -> Tensor",
    fake=_affine_fake,
    backends={"cpu": _affine_cpu},
    backward=_affine_backward,
    setup_context=_affine_setup,
)
register(
    "rearrange_rows_bwd",
    "(Tensor dy, Tensor? dsum, Tensor[] x, Tensor? ptr, Tensor idx, Tensor? weight, Tensor? bias, Tensor? gate, "
    "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, int reduce, int norm, float scale, float eps) "
    "-> (Tensor du, Tensor dv, Tensor partial)",
    fake=_rows_bwd_fake,
    backends={"cpu": _rows_bwd_cpu},
)
register(
    "rearrange_max_bwd",
    "(Tensor dy, Tensor x, Tensor ptr, Tensor idx) -> Tensor",
    fake=_max_bwd_fake,
    backends={"cpu": _max_bwd_cpu},
)
register(
    "rearrange_rows",
    "(Tensor[] x, Tensor? ptr, Tensor idx, Tensor? weight, Tensor? t_ptr, Tensor? t_idx, Tensor? t_weight, "
    "Tensor? bias, Tensor? gate, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, int reduce, int norm, "
    "float scale, float eps, bool with_sum, ScalarType dtype) -> (Tensor y, Tensor sum)",
    fake=_rows_fake,
    backends={"cpu": _rows_cpu},
    backward=_rows_backward,
    setup_context=_rows_setup,
)
register(
    "rearrange_rows_into",
    "(Tensor(a!) out, Tensor[] x, Tensor? ptr, Tensor idx, Tensor? weight, Tensor? bias, Tensor? gate, "
    "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor? rows, int reduce, int norm, float scale, "
    "float eps, bool accumulate) -> ()",
    fake=_into_fake,
    backends={"cpu": _into_cpu},
)
