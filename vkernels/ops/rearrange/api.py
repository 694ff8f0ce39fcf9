"""rearrange: the public door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vkernels.check import FLOATS, ShapeError, bind, refusal, require
from vkernels.dispatch import Backend, choose, like
from vkernels.library import DTYPE_CODE, cpu_why_not, cuda_why_not, op, triton_why_not
from vkernels.ops.rearrange import reference, torch_op
from vkernels.rearrangement.pattern import Affine
from vkernels.rearrangement.plan import RearrangePlan
from vkernels.remember import remembered

OP = "rearrange"


class Call(NamedTuple):
    x: list[torch.Tensor]  # b|1 rows.. c, the fill vectors last; one tensor of any rank for an affine move
    plan: RearrangePlan
    affine: Affine | None
    bias: torch.Tensor | None
    scale: float
    gate: torch.Tensor | None
    residual: torch.Tensor | None  # b n_out c
    norm: str | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    return_sum: bool
    out: torch.Tensor | None  # b s c
    rows: torch.Tensor | None  # int32 p n_out
    accumulate: bool
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the result
    doors: dict[str, Any] | None = None


def _sources(x: Sequence[torch.Tensor], plan: RearrangePlan) -> list[torch.Tensor]:
    """Every source as b|1 rows.. c, a view."""
    if len(x) != len(plan.sources):
        raise ShapeError(refusal(OP, "x", f"be {len(plan.sources)} tensors for {plan!r}", len(x)))
    made = []
    for i, (tensor, n) in enumerate(zip(x, plan.sources, strict=True)):
        name = "x" if len(x) == 1 else f"x[{i}]"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(refusal(OP, name, "be a tensor", type(tensor).__name__))
        if tensor.dim() < 2:
            raise ShapeError(refusal(OP, name, "have shape (b s c) or (s c)", tuple(tensor.shape)))
        view = tensor.unsqueeze(0) if plan.whole or tensor.dim() == 2 else tensor
        g = plan.in_groups
        if view.shape[1:-1].numel() != n and g > 1 and i == 0 and view.shape[0] % g == 0:
            view = view.unflatten(0, (-1, g))
        if view.shape[1:-1].numel() != n:
            raise ShapeError(refusal(OP, name, f"have {n} rows for {plan!r}", tuple(tensor.shape)))
        made.append(view)
    return made


def _check_floats(dtype: torch.dtype, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (*FLOATS, torch.float64):
            rule = "have dtype float32, bfloat16, float16"
            raise TypeError(refusal(OP, name, rule, str(tensor.dtype).removeprefix("torch.")))
        require(tensor is None or dtype.is_floating_point, OP, "x", f"have a float dtype to take {name}", dtype)


def prepare(
    x: torch.Tensor | Sequence[torch.Tensor],
    plan: RearrangePlan,
    *,
    fill: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    return_sum: bool = False,
    out: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    accumulate: bool = False,
    dtype: torch.dtype | None = None,
) -> Call:
    if not isinstance(plan, RearrangePlan):
        raise TypeError(refusal(OP, "plan", "be a RearrangePlan", type(plan).__name__))
    tensors = [x] if isinstance(x, torch.Tensor) else list(x)
    if not tensors or not isinstance(tensors[0], torch.Tensor):
        raise TypeError(refusal(OP, "x", "be a tensor or a list of tensors", type(x).__name__))
    first = tensors[0]
    if first.dtype not in DTYPE_CODE:
        raise TypeError(refusal(OP, "x", "have a float, integer or bool dtype", first.dtype))
    for i, tensor in enumerate([*tensors, fill]):
        if tensor is not None and (tensor.dtype, tensor.device) != (first.dtype, first.device):
            name = "fill" if i == len(tensors) else f"x[{i}]"
            rule = f"have the dtype and device of x ({first.dtype}, {first.device})"
            raise TypeError(refusal(OP, name, rule, f"{tensor.dtype}, {tensor.device}"))
    require(norm in torch_op.NORMS, OP, "norm", "be 'layer', 'rms' or None", repr(norm))
    require(
        norm is not None or (norm_weight is None and norm_bias is None), OP, "norm", "be given with its weights", norm
    )
    require(rows is None or out is not None, OP, "rows", "come with out", "no out")
    require(not accumulate or out is not None, OP, "accumulate", "come with out", "no out")
    require(out is None or not return_sum, OP, "return_sum", "be False with out", return_sum)
    extras = {"bias": bias, "gate": gate, "residual": residual, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check_floats(first.dtype, **extras)
    plain = all(t is None for t in extras.values()) and norm is None and scale == 1.0 and not return_sum
    wanted = dtype or (first.dtype if out is None else out.dtype)
    for name, value in (("dtype", wanted), ("x", first.dtype)):
        both = value.is_floating_point or (plain and wanted == first.dtype and plan.is_gather and not accumulate)
        require(both, OP, name, "be a float dtype unless single rows are moved as they are", value)

    affine: Affine | None = None
    shape: tuple[int, ...] | None = None
    if plan.pattern is not None:
        require(
            len(tensors) == 1 and fill is None, OP, "x", "be one tensor, without fill, for an affine plan", len(tensors)
        )
        affine = plan.pattern.resolve(tuple(first.shape))
        shape = affine.out_shape
        if not plain or out is not None or wanted != first.dtype:
            one = len(plan.pattern.outs[-1]) == 1
            require(one, OP, "plan", "keep whole rows to be followed by an epilogue", repr(plan))
            plan, affine = plan.rows(tuple(first.shape), first.device), None
    if affine is not None and shape is not None:
        none = (None, 1.0, None, None, None, None, None, eps, False, None, None, False)
        return Call(tensors, plan, affine, *none, wanted, shape)

    if plan.index.device != first.device:
        plan = plan.to(first.device)
    sources = _sources(tensors, plan)
    c = sources[0].shape[-1]
    if plan.fills:
        if fill is None:
            raise ValueError(refusal(OP, "fill", f"hold the {plan.fills} fill vectors of {plan!r}", None))
        if fill.numel() != plan.fills * c or fill.shape[-1] != c:
            raise ShapeError(refusal(OP, "fill", f"have shape ({plan.fills}, {c})", tuple(fill.shape)))
        sources.append(fill.reshape(1, plan.fills, c))
    else:
        require(fill is None, OP, "fill", f"be None: {plan!r} takes no fill vectors", "a tensor")
    b = torch_op.batch(sources, plan.index)
    for i, source in enumerate(sources):
        if source.shape[0] not in (1, b) or source.shape[-1] != c:
            raise ShapeError(refusal(OP, f"x[{i}]", f"have 1 or {b} samples of {c} channels", tuple(source.shape)))
    require(plan.samples in (1, b), OP, "plan", f"hold 1 or {b} samples", plan.samples)
    require(plan.reduce != "max" or len(sources) == 1, OP, "plan", "take its maximum over one source", repr(plan))
    bind(
        OP,
        ("x", sources[0][:1].flatten(0, -2), "s c"),
        ("bias", bias, "c"),
        ("norm_weight", norm_weight, "c"),
        ("norm_bias", norm_bias, "c"),
    )
    if gate is not None:
        if gate.dim() > 1 or gate.numel() not in (1, c):
            raise ShapeError(refusal(OP, "gate", f"have shape ({c}) or hold one value", tuple(gate.shape)))
        gate = gate.reshape(-1).expand(c)
    if shape is None:
        g, r = plan.out_groups, plan.n_out
        flat = plan.whole or (first.dim() == 2 and b == 1)
        lead = (g,) if flat and g > 1 else () if flat else (b * g,)
        shape = (*lead, r // g, c)
    if residual is not None:
        if tuple(residual.shape) not in (shape, (b, plan.n_out, c)):
            raise ShapeError(refusal(OP, "residual", f"have shape {shape}", tuple(residual.shape)))
        require(
            residual.device == first.device, OP, "residual", f"be on the device of x ({first.device})", residual.device
        )
        residual = residual.reshape(b, plan.n_out, c)
    if out is not None:
        out, rows = _target(out, rows, plan, b, c, shape)
        grown = [t for t in (*sources, bias, gate, residual, norm_weight, norm_bias, out) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in grown):
            rule = (
                "be used without gradients (torch.no_grad()); an assemble plan does the same in one differentiable pass"
            )
            raise ValueError(refusal(OP, "out", rule, "tensors that require grad"))
        shape = tuple(out.shape)
    return Call(
        sources, plan, None, bias, float(scale), gate, residual, norm, norm_weight, norm_bias, float(eps), return_sum,
        out, rows, accumulate, wanted, shape,
    )  # fmt: skip


def _target(
    out: torch.Tensor, rows: torch.Tensor | None, plan: RearrangePlan, b: int, c: int, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out as b s c and rows as int32 p n_out."""
    if not isinstance(out, torch.Tensor) or out.dtype not in DTYPE_CODE:
        raise TypeError(refusal(OP, "out", "be a tensor", type(out).__name__))
    if rows is None:
        if tuple(out.shape) != shape:
            raise ShapeError(refusal(OP, "out", f"have shape {shape}", tuple(out.shape)))
        return out.view(b, plan.n_out, c), None
    target = out.unsqueeze(0) if out.dim() == 2 else out
    if target.dim() != 3 or target.shape[0] != b or target.shape[-1] != c:
        raise ShapeError(refusal(OP, "out", f"have shape ({b}, s, {c})", tuple(out.shape)))
    require(target.stride(-1) == 1 or c <= 1, OP, "out", "have stride 1 in its last dimension", target.stride())
    rows = rows if rows.dim() == 2 else rows[None]
    if rows.dim() != 2 or rows.shape[0] not in (1, b) or rows.shape[1] != plan.n_out:
        raise ShapeError(refusal(OP, "rows", f"have shape ({plan.n_out}) or ({b}, {plan.n_out})", tuple(rows.shape)))
    require(rows.dtype in (torch.int32, torch.int64), OP, "rows", "have dtype int32 or int64", rows.dtype)
    return target, rows.to(torch.int32).contiguous()


class _Recipe(NamedTuple):
    """How calls that look alike become Calls: what `prepare` found, and the shapes it saw their tensors in."""

    chosen: Backend
    affine: Affine | None
    rows_of: tuple[int, ...] | None  # the shape of x, where the plan is affine and its rows are taken
    sources: list[torch.Size]
    gate: int | None  # channels
    residual: torch.Size | None
    out: torch.Size | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    doors: dict[str, Any]


@remembered
def _decide(
    x, form, fill, bias, scale, gate, residual, norm, norm_weight, norm_bias, eps, return_sum, out, rows, accumulate,
    dtype, backend, *, plan,
) -> _Recipe:  # fmt: skip
    call = prepare(
        x, plan, fill=fill, bias=bias, scale=scale, gate=gate, residual=residual, norm=norm, norm_weight=norm_weight,
        norm_bias=norm_bias, eps=eps, return_sum=return_sum, out=out, rows=rows, accumulate=accumulate, dtype=dtype,
    )  # fmt: skip
    first = x if isinstance(x, torch.Tensor) else x[0]
    return _Recipe(
        choose(OP, BACKENDS, backend, call),
        call.affine,
        tuple(first.shape) if plan.pattern is not None and call.affine is None else None,
        [source.shape for source in call.x],
        None if call.gate is None else call.gate.shape[0],
        None if call.residual is None else call.residual.shape,
        None if call.out is None else call.out.shape,
        call.dtype,
        call.shape,
        {},
    )


def _seen(x: torch.Tensor | None, shape: torch.Size | None) -> torch.Tensor | None:
    return x if x is None or shape is None or x.shape == shape else x.reshape(shape)


def _again(
    recipe: _Recipe, x, plan, fill, bias, scale, gate, residual, norm, norm_weight, norm_bias, eps, return_sum, out,
    rows, accumulate,
) -> Call:  # fmt: skip
    """The Call that `prepare` makes of these."""
    tensors = [x] if isinstance(x, torch.Tensor) else list(x)
    if recipe.affine is None:
        device = tensors[0].device
        if recipe.rows_of is not None:
            plan = plan.rows(recipe.rows_of, device)
        if plan.index.device != device:
            plan = plan.to(device)
        if fill is not None:
            tensors.append(fill)
        tensors = [
            t if t.shape == shape else t.reshape(shape) for t, shape in zip(tensors, recipe.sources, strict=True)
        ]
    if gate is not None and gate.shape != (recipe.gate,):
        gate = gate.reshape(-1).expand(recipe.gate)
    if residual is not None and residual.shape != recipe.residual:
        residual = residual.reshape(recipe.residual)
    if out is not None and out.shape != recipe.out:
        out = out.view(recipe.out)
    if rows is not None:
        rows = (rows if rows.dim() == 2 else rows[None]).to(torch.int32).contiguous()
    return Call(
        tensors, plan, recipe.affine, bias, float(scale), gate, residual, norm, norm_weight, norm_bias, float(eps),
        return_sum, out, rows, accumulate, recipe.dtype, recipe.shape, recipe.doors,
    )  # fmt: skip


def rearrange(
    x: torch.Tensor | Sequence[torch.Tensor],
    plan: RearrangePlan,
    *,
    fill: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    return_sum: bool = False,
    out: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    accumulate: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Reorder, drop, pool or assemble tokens in one pass, and finish them on the way.

    v[r] = sum over the taps of row r of weight * x[idx];  u = residual + scale * gate * (v + bias);  y = norm(u).

    Args:
        x:           tokens (b s c), or (s c); s may be several axes, (b t h w c). A list where the plan has several
                     sources; a source of one sample, (n c) or (1 n c), is shared by all. Integers and bools are moved
                     by plans of single rows (positions, labels)
        plan:        a RearrangePlan; see vkernels.rearrangement for its builders
        fill:        the plan's fill vectors (k c): newline tokens, CLS embeddings. They pass the epilogue like any row
        bias:        (c)
        scale:       a number
        gate:        (c), or one value
        residual:    (b n_out c), the result's shape
        norm:        "layer" or "rms"; norm_weight (c), norm_bias (c) and eps belong to it
        return_sum:  also return u, in the dtype of x (the residual stream next to its norm)
        out:         write here instead of into a new tensor; changed in place, without gradients
        rows:        where row r goes in out: (n_out) or (b n_out), -1 drops it, no row twice
        accumulate:  add to out instead of replacing
        dtype:       of the result; None means that of x, or of out
        backend:     "cpu", "cuda", "triton", "reference"; None takes the first that can run
    Returns:
        (b n_out c), folded to (b*g n_out/g c) by plans of sequences such as temporal; with return_sum a pair (y, u);
        with out that tensor. Computed in float32; a pure move is exact.
    Raises:
        ShapeError, TypeError, ValueError, NoBackend
    Gradients: x, fill, bias, gate, residual, norm_weight, norm_bias; plan weights are constants; the gradient of a
    maximum is shared by equal winners.   Deterministic: yes.
    Example:
        >>> x = torch.randn(2, 4 * 9, 64)
        >>> rearrange(x, rearrangement.pool(4, 3, 3, mode="mean", stride=3)).shape
        torch.Size([2, 4, 64])
    Source: the token moves of BT-Adapter, ST-LLM, INTP-Video-LLMs, LLaVA-OneVision and Qwen2.5-VL.
    """
    form = plan.form if isinstance(plan, RearrangePlan) else plan
    recipe = _decide(
        x, form, fill, bias, scale, gate, residual, norm, norm_weight, norm_bias, eps, return_sum, out, rows,
        accumulate, dtype, backend, plan=plan,
    )  # fmt: skip
    call = _again(
        recipe, x, plan, fill, bias, scale, gate, residual, norm, norm_weight, norm_bias, eps, return_sum, out, rows,
        accumulate,
    )  # fmt: skip
    result = recipe.chosen.run(call)
    if out is not None:
        return out
    return result if return_sum else result[0]


def _run_reference(call: Call) -> tuple[torch.Tensor, ...]:
    if call.affine is not None:
        return (reference.move(call.x[0], call.affine),)
    plan = call.plan
    y = u = reference.gather(call.x, plan.ptr, plan.index, plan.weight, plan.n_out, plan.reduce)
    if call.bias is not None or call.gate is not None or call.residual is not None or call.norm or call.scale != 1.0:
        y, u = reference.epilogue(
            y, call.bias, call.gate, call.residual, call.norm, call.norm_weight, call.norm_bias, call.scale, call.eps
        )
    if call.out is None:
        y = y.to(call.dtype).view(call.shape)
        return y, u.to(call.x[0].dtype).view(call.shape)
    target, b = call.out, call.out.shape[0]
    rows = torch.arange(plan.n_out, device=y.device)[None] if call.rows is None else call.rows.long()
    at, rows = torch.arange(b, device=y.device)[:, None].expand(b, plan.n_out), rows.expand(b, -1)
    at, y, rows = at[rows >= 0], y[rows >= 0], rows[rows >= 0]
    if call.accumulate:
        y = y + target[at, rows].to(y.dtype)
    target[at, rows] = y.to(target.dtype)
    return ()


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _run_native(call: Call, backend: str) -> tuple[torch.Tensor, ...]:
    if call.affine is not None:
        a = call.affine
        return (op("rearrange_affine", backend, call.doors)(call.x[0], a.axes, a.sizes, a.steps, a.out_shape),)
    plan = call.plan
    vectors = call.bias, call.gate, call.norm_weight, call.norm_bias
    bias, gate, norm_weight, norm_bias = map(_float, vectors) if backend == "cpu" else vectors
    plain = (bias, gate, call.residual, norm_weight, norm_bias)
    how = (torch_op.REDUCES[plan.reduce], torch_op.NORMS[call.norm], call.scale, call.eps)
    if call.out is not None:
        op("rearrange_rows_into", backend, call.doors)(
            call.out, call.x, plan.ptr, plan.idx, plan.weight, *plain, call.rows, *how, call.accumulate
        )
        return ()
    back: tuple = (None, None, None)
    linear = plan.reduce == "sum" or backend != "cpu"  # the CPU finds a maximum's winners without the transpose
    if linear and torch.is_grad_enabled() and any(s.requires_grad for s in call.x):
        back = plan.transposed()
    y, u = op("rearrange_rows", backend, call.doors)(
        call.x, plan.ptr, plan.idx, plan.weight, *back, *plain, *how, call.return_sum, call.dtype
    )
    return (y if y.shape == call.shape else y.view(call.shape)), u.view(call.shape) if call.return_sum else u


def _cpu_why_not(call: Call) -> str | None:
    for tensor in (*call.x, call.residual, call.out):
        if tensor is None:
            continue
        if tensor.dtype == torch.float64 and call.affine is not None:
            continue
        if (reason := cpu_why_not(tensor)) is not None:
            return reason
    if call.dtype == torch.float64 and call.affine is None:
        return "dtype float64 is served by the reference only"
    if len(call.x) > 8:
        return f"{len(call.x)} sources, it takes at most 8"
    return None


def _gpu_why_not(call: Call, why_not: Callable[[torch.Tensor], str | None]) -> str | None:
    """What both GPU backends refuse."""
    for tensor in (*call.x, call.residual, call.out):
        if tensor is None:
            continue
        if call.affine is not None and tensor.dtype == torch.float64:
            tensor = tensor.new_empty(0, dtype=torch.int64)  # a move sees bits
        if (reason := why_not(tensor)) is not None:
            return reason
    if call.affine is not None:
        return None
    if call.dtype == torch.float64:
        return "dtype float64 is served by the reference only"
    if len(call.x) > torch_op.SOURCES:
        return f"{len(call.x)} sources, it takes at most {torch_op.SOURCES}, the fill vectors counted as one"
    if any(len(torch_op.row_axes(x)) > 3 for x in call.x):
        return "a source's rows lie on more than 3 axes of unrelated strides"
    return None


def _triton_why_not(call: Call) -> str | None:
    if (reason := _gpu_why_not(call, triton_why_not)) is not None:
        return reason
    if call.norm is not None and call.x[0].shape[-1] > torch_op.WIDEST_NORM:
        return f"{call.x[0].shape[-1]} channels, a norm takes at most {torch_op.WIDEST_NORM}"
    return None


def _cuda_why_not(call: Call) -> str | None:
    if (reason := _gpu_why_not(call, cuda_why_not)) is not None:
        return reason
    if call.affine is not None:
        return None
    if call.plan.reduce == "max":
        return "a maximum is not written in CUDA C++"
    whole = call.norm is not None or call.bias is not None or call.gate is not None
    if whole and call.x[0].shape[-1] > torch_op.WIDEST_CUDA_ROW:
        return f"{call.x[0].shape[-1]} channels, with a norm, bias or gate it takes at most {torch_op.WIDEST_CUDA_ROW}"
    return None


def _kind(call: Call) -> tuple[torch.device, str]:
    """A move sees bytes; rows are reduced, and may be normalised."""
    x = call.x[0]
    if call.affine is not None:
        return x.device, f"{x.element_size()} bytes, a move"
    return like(x, None, call.plan.reduce, *([] if call.norm is None else ["a norm"]))


BACKENDS = (
    Backend("cpu", _cpu_why_not, lambda c: _run_native(c, "cpu")),
    Backend("cuda", _cuda_why_not, lambda c: _run_native(c, "cuda"), _kind),
    Backend("triton", _triton_why_not, lambda c: _run_native(c, "triton")),
    Backend("reference", lambda c: None, _run_reference),
)
