"""qkv_prologue: the public door."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vkernels.check import bind, require, same_dtype
from vkernels.dispatch import Backend, choose, like
from vkernels.kv_cache import KVCache
from vkernels.library import cpu_why_not, cuda_why_not, op, triton_why_not
from vkernels.ops.apply_rope.api import canonical_positions
from vkernels.ops.qkv_prologue import reference, torch_op  # noqa: F401  (registers the overloads)
from vkernels.remember import remembered
from vkernels.rope import RopeSpec


class Call(NamedTuple):
    qkv: torch.Tensor
    heads: tuple[int, int, int]  # n m d
    bias: torch.Tensor | None  # of the dtype of qkv, or of what is computed in; as the norms
    norms: tuple[torch.Tensor | None, torch.Tensor | None]
    norm_offset: float
    spec: RopeSpec | None
    pos: torch.Tensor | None  # axes b|1 s
    eps: float
    post: bool
    all_heads: bool
    rows: tuple[torch.Tensor, torch.Tensor] | None  # b s m d: where k and v go
    doors: dict[str, Any] | None = None


def _direct(cache: KVCache) -> bool:
    return cache.bits == 0 and not cache.paged and not cache.ring and len(set(cache._lengths)) == 1


def _vector(x: torch.Tensor | None, dtype: torch.dtype, inner: torch.dtype) -> torch.Tensor | None:
    """bias and norms as operators take them: contiguous, of the dtype of qkv or of what is computed in."""
    if x is None:
        return None
    return (x if x.dtype == dtype else x.to(inner)).contiguous()


def _rows(cache: KVCache | None, s: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where the keys and values of s more tokens go, if the kernel itself may put them there."""
    if cache is None:
        return None
    cache.refuse_overflow("qkv_prologue", [s] * cache.b)
    return cache.rows(s) if _direct(cache) else None


def prepare(
    qkv: torch.Tensor,
    *,
    n: int,
    m: int,
    spec: RopeSpec | None = None,
    pos: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_order: str = "pre",
    norm_scope: str = "head",
    norm_offset: float = 0.0,
    cache: KVCache | None = None,
) -> Call:
    name = "qkv_prologue"
    sizes = bind(name, ("qkv", qkv, "b s c"))
    same_dtype(name, ("qkv", qkv))
    b, s, c = sizes["b"], sizes["s"], sizes["c"]
    for argument, count in (("n", n), ("m", m)):
        require(isinstance(count, int) and count >= 1, name, argument, "be an integer of at least 1", count)
    rule = f"have (n + 2 m) d columns with n={n}, m={m}"
    require(c > 0 and c % (n + 2 * m) == 0, name, "qkv", rule, c)
    d = c // (n + 2 * m)
    require(norm_order in ("pre", "post"), name, "norm_order", "be pre or post", repr(norm_order))
    require(norm_scope in ("head", "all"), name, "norm_scope", "be head or all", repr(norm_scope))
    require(norm_eps >= 0, name, "norm_eps", "be at least 0", norm_eps)
    all_heads = norm_scope == "all"
    columns = {"bias": c, "q_norm": n * d if all_heads else d, "k_norm": m * d if all_heads else d}
    for argument, x in (("bias", bias), ("q_norm", q_norm), ("k_norm", k_norm)):
        bind(name, ("qkv", qkv, "b s c"), (argument, x, str(columns[argument])))
        same_dtype(name, (argument, x))
    require((spec is None) == (pos is None), name, "pos", "be given exactly where spec is", pos is not None)
    if spec is not None and pos is not None:
        require(isinstance(spec, RopeSpec), name, "spec", "be a RopeSpec", type(spec).__name__, TypeError)
        end = spec.offset + spec.rotary_dim
        require(end <= d, name, "spec", f"rotate within the head (d={d})", f"{spec.offset}..{end}")
        heads = len(spec.axis_rows)
        for argument, count in (("n", n), ("m", m)):
            require(count % heads == 0, name, argument, f"be a multiple of the {heads} heads of spec", count)
        pos = canonical_positions(name, spec, pos, b, s)
        require(pos.device == qkv.device, name, "pos", f"be on the device of qkv ({qkv.device})", pos.device, TypeError)
    if cache is not None:
        require(isinstance(cache, KVCache), name, "cache", "be a KVCache", type(cache).__name__, TypeError)
        require((cache.b, cache.m, cache.d) == (b, m, d), name, "cache", f"have b={b}, m={m}, d={d}", cache)
        require(cache.dtype == qkv.dtype, name, "cache", f"hold the dtype of qkv ({qkv.dtype})", cache.dtype, TypeError)
        same = cache.device.type == qkv.device.type
        require(same, name, "cache", f"be on the device of qkv ({qkv.device})", cache.device, TypeError)
        tracked = any(x is not None and x.requires_grad for x in (qkv, bias, q_norm, k_norm))
        require(not (tracked and torch.is_grad_enabled()), name, "cache", "be None where a gradient is needed", cache)
    inner = torch.promote_types(qkv.dtype, torch.float32)
    bias, q_norm, k_norm = (_vector(x, qkv.dtype, inner) for x in (bias, q_norm, k_norm))
    post, offset = norm_order == "post", float(norm_offset)
    return Call(
        qkv, (n, m, d), bias, (q_norm, k_norm), offset, spec, pos, float(norm_eps), post, all_heads, _rows(cache, s)
    )


@remembered
def _decide(
    qkv, n, m, spec, pos, bias, q_norm, k_norm, eps, order, scope, offset, form, direct, backend, *, cache
) -> tuple[Backend, tuple[Any, ...], tuple[int, ...] | None, dict[str, Any]]:
    """(backend, what of a Call is no tensor, the shape of its positions, doors). `form` is what the cache looks like,
    `direct` whether the kernel writes to it."""
    call = prepare(
        qkv, n=n, m=m, spec=spec, pos=pos, bias=bias, q_norm=q_norm, k_norm=k_norm, norm_eps=eps, norm_order=order,
        norm_scope=scope, norm_offset=offset, cache=cache,
    )  # fmt: skip
    chosen = choose("qkv_prologue", BACKENDS, backend, call)
    shape = None if call.pos is None else tuple(call.pos.shape)
    inner = torch.promote_types(qkv.dtype, torch.float32)
    return chosen, (call.heads, inner, call.norm_offset, call.eps, call.post, call.all_heads), shape, {}


def qkv_prologue(
    qkv: torch.Tensor,
    *,
    n: int,
    m: int,
    spec: RopeSpec | None = None,
    pos: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_order: str = "pre",
    norm_scope: str = "head",
    norm_offset: float = 0.0,
    cache: KVCache | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What comes before attention, in one pass over the packed projection: bias, QK-norm, rotation, cache write.

    Args:
        qkv: `[b, s, (n + 2 m) d]` float32, bfloat16 or float16: all query heads, then keys, then values.
        n: query heads.
        m: key/value heads.
        spec: which angle each pair turns by, or None to turn nothing.
        pos: `[axes, s]` or `[axes, b, s]` as in `apply_rope`; given exactly where spec is.
        bias: `[(n + 2 m) d]`.
        q_norm: weight of the RMS norm of the queries, `[d]`, or `[n d]` with norm_scope="all"; None for no norm.
        k_norm: likewise of the keys, `[d]` or `[m d]`.
        norm_eps: added to the mean square.
        norm_order: "pre" normalises before the rotation, "post" after it.
        norm_scope: "head" normalises each head, "all" the heads of a token together.
        norm_offset: added to both weights (1 for Gemma).
        cache: takes the keys and values at its end; then no gradient, and only q is returned.
        backend: None takes the first that can run the call.

    Returns:
        `(q [b, s, n, d], k [b, s, m, d], v [b, s, m, d])`, or q where a cache took k and v. Computed in float32,
        rounded once. Gradients for qkv, bias, q_norm and k_norm. Deterministic, whatever the number of threads.

    Raises:
        ValueError, TypeError, ShapeError: an argument breaks the rules above.

    Example:
        >>> spec = RopeSpec.build(64)
        >>> q, k, v = qkv_prologue(torch.randn(1, 5, 8 * 64), n=4, m=2, spec=spec, pos=torch.arange(5))

    Source: QK-norm, arXiv:2302.05442; M-RoPE, arXiv:2409.12191.
    """
    form, direct = (cache.form, _direct(cache)) if isinstance(cache, KVCache) else (None, False)
    chosen, (heads, inner, offset, eps, post, all_heads), shape, doors = _decide(
        qkv, n, m, spec, pos, bias, q_norm, k_norm, norm_eps, norm_order, norm_scope, norm_offset, form, direct,
        backend, cache=cache,
    )  # fmt: skip
    if pos is not None and shape is not None and pos.shape != shape:
        pos = pos.view(shape)
    dtype = qkv.dtype
    bias, norms = _vector(bias, dtype, inner), (_vector(q_norm, dtype, inner), _vector(k_norm, dtype, inner))
    rows = _rows(cache, qkv.shape[1])
    q, k, v = chosen.run(Call(qkv, heads, bias, norms, offset, spec, pos, eps, post, all_heads, rows, doors))
    if cache is None:
        return q, k, v
    if rows is None:
        cache.append(k, v, backend=backend)
    else:
        cache.advance(qkv.shape[1])
    return q


def _registered(call: Call, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = call.spec
    axis, freq = (None, None) if spec is None else spec.tables(call.qkv.device)
    blocks, offset, scale = (1, 0, 1.0) if spec is None else (spec.blocks, spec.offset, spec.scale)
    layout = [*call.heads, blocks, offset, int(call.post), int(call.all_heads)]
    rest = (call.bias, *call.norms, call.pos, axis, freq, scale, call.eps, layout, call.norm_offset)
    if call.rows is None:
        return op("qkv_prologue", backend, call.doors)(call.qkv, *rest)
    return op("qkv_prologue_", backend, call.doors)(call.qkv, *call.rows, *rest), *call.rows


def _reference(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inner = torch.promote_types(call.qkv.dtype, torch.float32)
    bias = None if call.bias is None else call.bias.to(inner)
    q_norm, k_norm = (None if x is None else x.to(inner) + call.norm_offset for x in call.norms)
    q, k, v = reference.qkv_prologue(
        call.qkv, call.heads, bias, (q_norm, k_norm), call.spec, call.pos, call.eps, call.post, call.all_heads
    )
    if call.rows is None:
        return q, k, v
    for row, x in zip(call.rows, (k, v), strict=True):
        row.copy_(x)
    return q, *call.rows


def _cuda_why_not(call: Call) -> str | None:
    if (reason := cuda_why_not(call.qkv)) is not None:
        return reason
    if call.heads[2] > 256:
        return f"heads have {call.heads[2]} elements, this backend serves up to 256"
    if call.spec is not None and len(call.spec.axis_rows) > 64:
        return f"the axes of spec have {len(call.spec.axis_rows)} rows, this backend serves up to 64"
    return None


BACKENDS = (
    Backend("cpu", lambda c: cpu_why_not(c.qkv), lambda c: _registered(c, "cpu")),
    Backend("cuda", _cuda_why_not, lambda c: _registered(c, "cuda"), lambda c: like(c.qkv, c.heads[2])),
    Backend("triton", lambda c: triton_why_not(c.qkv), lambda c: _registered(c, "triton")),
    Backend("reference", lambda c: None, _reference),
)
