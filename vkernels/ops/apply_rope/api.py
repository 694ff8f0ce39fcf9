"""apply_rope: the public door."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vkernels.check import bind, refusal, require, same_dtype
from vkernels.dispatch import Backend, choose, like
from vkernels.library import cpu_why_not, cuda_why_not, op, triton_why_not
from vkernels.ops.apply_rope import reference, torch_op  # noqa: F401  (registers the overloads)
from vkernels.remember import remembered
from vkernels.rope import RopeSpec

POSITIONS = (torch.int32, torch.int64, torch.float32, torch.float64)


class Call(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor | None
    spec: RopeSpec
    pos: torch.Tensor | None  # axes b|1 s
    cos: torch.Tensor | None  # b|1 s r, or b|1 s 2 r
    sin: torch.Tensor | None
    inverse: bool
    scale: float
    inplace: bool
    doors: dict[str, Any] | None = None


def canonical_positions(name: str, spec: RopeSpec, pos: torch.Tensor, b: int, s: int) -> torch.Tensor:
    """`pos` as [axes, b|1, s]; one-axis specs also take [s] and [b, s]."""
    require(isinstance(pos, torch.Tensor), name, "pos", "be a tensor", type(pos).__name__, TypeError)
    require(pos.dtype in POSITIONS, name, "pos", "be int32, int64, float32 or float64", pos.dtype, TypeError)
    axes = spec.n_axes
    if pos.dim() == 1:
        pos = pos.view(1, 1, pos.shape[0])
    elif pos.dim() == 2:
        by_batch = axes == 1 and pos.shape[0] != 1 and pos.shape[0] == b
        pos = pos.unsqueeze(0 if by_batch else 1)
    if not (pos.dim() == 3 and axes <= pos.shape[0] <= 4 and pos.shape[1] in (1, b) and pos.shape[2] == s):
        rule = f"have shape (axes={axes}, s={s}) or (axes={axes}, b={b}, s={s})"
        require(False, name, "pos", rule, tuple(pos.shape))
    return pos


def refuse_unusable_positions(name: str, pos: torch.Tensor) -> None:
    """What native code checks before it turns anything, for the paths that are plain PyTorch. On the CPU only: looking
    at values elsewhere, or while tracing, would wait for the device."""
    if pos.device.type != "cpu" or torch.compiler.is_compiling() or not pos.numel():
        return
    least, most = pos.aminmax()
    if not -(2**31) < least.item() <= most.item() < 2**31:
        bad = ~(pos.double().abs() < 2**31)
        require(False, name, "pos", "be finite and below 2^31 in magnitude", pos[bad][0].item())


def positions_of(name: str, spec: RopeSpec, pos: torch.Tensor | None, angle: str, b: int, s: int) -> torch.Tensor:
    """[axes, b|1, s] of a call whose angles are computed."""
    require(angle in ("exact", "hf_fp32"), name, "angle", "be exact, hf_fp32 or (cos, sin)", repr(angle))
    if pos is None:
        raise ValueError(refusal(name, "pos", f"be given with angle={angle!r}", None))
    if angle != "exact":
        require(len(spec.axis_rows) == 1, name, "angle", "be exact where heads follow different axes", angle)
    return canonical_positions(name, spec, pos, b, s)


def float32_table(spec: RopeSpec, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [b|1, s, r] of positions [axes, b|1, s] in Hugging Face's float32 arithmetic."""
    axis, freq = spec.float32_tables(pos.device)
    row = pos.permute(1, 2, 0)
    if spec.n_axes > 1:
        row = row.index_select(2, axis)
    elif pos.shape[0] > 1:
        row = row[..., :1]
    if row.dtype == torch.float64:
        row = row.float()
    table = row * freq  # positions become float32 first
    return table.cos(), table.sin()


def tables_of(
    name: str, spec: RopeSpec, angle: tuple[torch.Tensor, torch.Tensor], b: int, s: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caller's tables as float32 [b|1, s, r] or [b|1, s, 2, r]."""
    require(len(angle) == 2, name, "angle", "be exact, hf_fp32 or (cos, sin)", angle)
    if angle[0].dim() == 4:
        return tables_of_members(name, spec, *angle, b, s)
    tables = []
    for argument, table in zip(("cos", "sin"), angle, strict=True):
        if table.dim() == 2:
            table = table[None]
        good = table.dim() == 3 and table.shape[0] in (1, b) and table.shape[1] == s
        good = good and table.shape[2] in (spec.pairs, spec.rotary_dim)
        rule = f"have shape (b|1, s={s}, r={spec.pairs}), or twice r as Hugging Face repeats it"
        require(good, name, argument, rule, tuple(table.shape))
        if table.shape[2] != spec.pairs:
            table = (
                table[..., ::2]
                if spec.layout == "pair"
                else table.unflatten(-1, (spec.blocks, 2, -1))[..., 0, :].flatten(-2)
            )
        tables.append(table.float())
    return tables[0], tables[1]


def tables_of_members(
    name: str, spec: RopeSpec, cos: torch.Tensor, sin: torch.Tensor, b: int, s: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caller's tables of angles for each member of a pair, as float32 [b|1, s, 2, r]."""
    for argument, table in (("cos", cos), ("sin", sin)):
        good = table.dim() == 4 and table.shape[0] in (1, b) and table.shape[1:] == (s, 2, spec.pairs)
        require(good, name, argument, f"have shape (b|1, s={s}, 2, r={spec.pairs})", tuple(table.shape))
    layout = spec.layout
    require(layout == "pair", name, "spec", "have layout='pair' where each member has its own angle", repr(layout))
    return cos.float(), sin.float()


def angles_of(
    name: str, spec: RopeSpec, pos: torch.Tensor | None, angle: str | tuple[torch.Tensor, torch.Tensor], b: int, s: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(pos, cos, sin) of a call: positions for exact angles, else tables."""
    if not isinstance(angle, str):
        return None, *tables_of(name, spec, angle, b, s)
    pos = positions_of(name, spec, pos, angle, b, s)
    if angle == "exact":
        return pos, None, None
    refuse_unusable_positions(name, pos)
    return None, *float32_table(spec, pos)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor | None,
    spec: RopeSpec,
    pos: torch.Tensor | None = None,
    *,
    inverse: bool = False,
    inplace: bool = False,
    angle: str | tuple[torch.Tensor, torch.Tensor] = "exact",
) -> Call:
    name = "apply_rope"
    require(isinstance(spec, RopeSpec), name, "spec", "be a RopeSpec", type(spec).__name__, TypeError)
    sizes = bind(name, ("q", q, "b s n d"), ("k", k, "b s m d"))
    same_dtype(name, ("q", q), ("k", k))
    end = spec.offset + spec.rotary_dim
    if end > sizes["d"]:
        require(False, name, "spec", f"rotate within the head (d={sizes['d']})", f"{spec.offset}..{end}")
    heads = len(spec.axis_rows)
    for argument in ("n", "m") if heads > 1 else ():
        if sizes.get(argument, 0) % heads:
            rule = f"have a multiple of the {heads} heads of spec"
            require(False, name, "q" if argument == "n" else "k", rule, sizes[argument])
    pos, cos, sin = angles_of(name, spec, pos, angle, sizes["b"], sizes["s"])
    if cos is not None and cos.dim() == 4:
        require(not inverse, name, "inverse", "be False where each member of a pair has its own angle", inverse)
    for argument, given in (("pos", pos), ("cos", cos), ("sin", sin)):
        if given is not None and given.device != q.device:
            require(False, name, argument, f"be on the device of q ({q.device})", given.device, TypeError)
    if inplace:
        tracked = torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad))
        require(not tracked, name, "inplace", "be False where q or k requires grad", True)
        for argument, x in (("q", q), ("k", k)):
            unit = x is None or x.stride(-1) == 1 or x.shape[-1] <= 1
            require(unit, name, argument, "have stride 1 in its last dimension to be rotated in place", "another")
    scale = 1.0 / spec.scale if inverse else spec.scale
    return Call(q, k, spec, pos, cos, sin, inverse, scale, inplace)


class Decision(NamedTuple):
    backend: Backend
    shape: tuple[int, ...] | None  # of the positions as [axes, b|1, s]; None with the caller's tables
    doors: dict[str, Any]


@remembered
def decide(q, k, spec, pos, inverse, inplace, angle, backend) -> Decision:
    call = prepare(q, k, spec, pos, inverse=inverse, inplace=inplace, angle=angle)
    chosen = choose("apply_rope", BACKENDS, backend, call)
    shape = None
    if isinstance(angle, str):
        shape = tuple(positions_of("apply_rope", spec, pos, angle, *q.shape[:2]).shape)  # a view by a Size costs 1 us
    return Decision(chosen, shape, {})


def turn(
    decision: Decision, q, k, spec: RopeSpec, pos, inverse=False, inplace=False, angle: Any = "exact"
) -> tuple[torch.Tensor, Any]:
    """(q, k or None) turned as was decided for calls that look like this one."""
    chosen, shape, doors = decision
    cos = sin = None
    if shape is None:
        pos, cos, sin = angles_of("apply_rope", spec, pos, angle, *q.shape[:2])
    else:
        if pos.shape != shape:
            pos = pos.view(shape)
        if angle != "exact":
            if chosen.name in ("cpu", "reference"):  # GPU backends look at no value
                refuse_unusable_positions("apply_rope", pos)
            cos, sin = float32_table(spec, pos)
            pos = None
    scale = 1.0 / spec.scale if inverse else spec.scale
    return chosen.run(Call(q, k, spec, pos, cos, sin, inverse, scale, inplace, doors))


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    spec: RopeSpec,
    pos: torch.Tensor | None = None,
    *,
    inverse: bool = False,
    inplace: bool = False,
    angle: str | tuple[torch.Tensor, torch.Tensor] = "exact",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: `[b, s, n, d]` float32, bfloat16 or float16, any strides.
        k: `[b, s, m, d]`, or None.
        spec: which angle each pair turns by.
        pos: `[axes, s]` or `[axes, b, s]` (one axis: also `[s]`, `[b, s]`), int or float, finite and below 2^31 in
            magnitude. Integer positions are exact; real ones are taken to 2^-32.
        inverse: undo the rotation (and the attention scale).
        inplace: mutate `q` and `k` and return them; refused where a gradient would need them.
        angle: "exact"; "hf_fp32", the float32 table Hugging Face computes; or the caller's `(cos, sin)` tables
            `[b|1, s, r]` or with r repeated to 2 r; `[b|1, s, 2, r]` turns each member of a neighbouring pair by an
            angle of its own (V-JEPA2's positions). A given table is still multiplied by `spec.scale`.
        backend: None takes the first that can run the call.

    Returns:
        `(q, k)` rotated, contiguous, or only q where `k` is None. Rotated in float32, rounded once. Gradients for q and
        k. Deterministic.

    Raises:
        ValueError, TypeError, ShapeError: an argument breaks the rules above.

    Example:
        >>> spec = RopeSpec.build(64)
        >>> q, k = apply_rope(torch.randn(1, 5, 4, 64), torch.randn(1, 5, 2, 64), spec, torch.arange(5))

    Source: RoFormer, arXiv:2104.09864.
    """
    decision = decide(q, k, spec, pos, inverse, inplace, angle, backend)
    q_out, k_out = turn(decision, q, k, spec, pos, inverse, inplace, angle)
    if k is None:
        return q_out
    return q_out, k_out


def _registered(call: Call, backend: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    axis, freq = (None, None) if call.pos is None else call.spec.tables(call.q.device)
    layout = [call.spec.blocks, call.spec.offset]
    rest = (call.pos, axis, freq, call.cos, call.sin, call.scale, call.inverse, layout)
    if call.inplace:
        op("apply_rope_", backend, call.doors)(call.q, call.k, *rest)
        return call.q, call.k
    return op("apply_rope", backend, call.doors)(call.q, call.k, *rest)


def _reference(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    if call.pos is not None:
        refuse_unusable_positions("apply_rope", call.pos)
    out = reference.apply_rope(call.q, call.k, call.spec, call.pos, call.cos, call.sin, call.inverse, call.scale)
    if not call.inplace:
        return out
    for x, y in zip((call.q, call.k), out, strict=True):
        if x is not None and y is not None:
            x.copy_(y)
    return call.q, call.k


def _cuda_why_not(call: Call) -> str | None:
    if call.cos is not None and call.cos.dim() == 4:
        return "each member of a pair has an angle of its own, this backend turns both by one"
    return cuda_why_not(call.q)


BACKENDS = (
    Backend("cpu", lambda c: cpu_why_not(c.q), lambda c: _registered(c, "cpu")),
    Backend("cuda", _cuda_why_not, lambda c: _registered(c, "cuda"), lambda c: like(c.q)),
    Backend("triton", lambda c: triton_why_not(c.q), lambda c: _registered(c, "triton")),
    Backend("reference", lambda c: None, _reference),
)
