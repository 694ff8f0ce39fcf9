"""torch's view of divided_attention: schemas, fakes, native kernels, backward.

`layout` is [t, l, cls, spatial, patch-major, frames per group]. Nothing but q, k and v is saved: the backward computes
the probabilities again, a whole row at a time.

`angles` [b|1, t, d], where q and k are to be rotated inside, hold the cosines of the pairs of each frame and then their
sines, float32; `neighbours`: which pairs. Only the CUDA kernels know them, and not for every call (api.py).
"""

from __future__ import annotations

from functools import cache

import torch

from vkernels.check import require
from vkernels.library import fresh, lazily, native, op, ref, register, run_cuda, unit_stride, whole_vectors
from vkernels.rope import RopeSpec

PACKED = 16  # frames that attend together, up to which a warp of the CUDA kernels has several (csrc: kPackedLength)
TURNED = 128  # up to which they rotate q and k (csrc: kTurnedLength)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def refuse_angles(angles: torch.Tensor | None) -> None:
    require(angles is None, "divided_attention", "angles", "be None on a backend that does not rotate inside", "some")


def _fake(q, k, v, scale, layout, angles=None, neighbours=False):
    return _like(q)


def _cpu(q, k, v, scale, layout, angles=None, neighbours=False):
    refuse_angles(angles)
    o = fresh(_like(q))
    native().divided_attention_fwd(ref(unit_stride(q)), ref(unit_stride(k)), ref(unit_stride(v)), ref(o), scale, layout)
    return o


@cache
def _unit(pairs: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.cat([torch.ones(pairs, device=device), torch.zeros(pairs, device=device)])


def angles_of(spec: RopeSpec, pos: torch.Tensor) -> torch.Tensor:
    """What the CUDA kernels take as `angles`, of positions [axes, b|1, t]: (1, 0) in every pair, turned, is its cosine
    and its sine."""
    unit = (_unit.__wrapped__ if torch.compiler.is_compiling() else _unit)(spec.pairs, pos.device)
    rows = unit.expand(*pos.shape[1:], 1, 2 * spec.pairs)
    halves = [1, 0]
    turned, _ = op("apply_rope", "cuda")(
        rows, None, pos, *spec.tables(pos.device), None, None, spec.scale, False, halves
    )
    return turned[:, :, 0]


def _scratch(q: torch.Tensor, heads: tuple[int, ...], layout: list[int], stats: bool) -> list[torch.Tensor | None]:
    """float32 memory: what every group leaves for the CLS token it shares, per tensor of so many heads, None where
    there is no such token; before it, if asked, two numbers per query. Native code refuses layouts that make no
    sense."""
    t, l, cls, spatial, _, frames = (max(x, 0) for x in (layout if len(layout) == 6 else [0] * 6))  # noqa: E741
    b, groups = q.shape[0], t // max(frames, 1)
    sequences, length = (groups, cls + frames * l) if spatial else (groups * l, frames)
    part = [q.new_empty((b, n, groups, q.shape[3]), dtype=torch.float32) if cls and spatial else None for n in heads]
    return [q.new_empty((b, sequences, q.shape[2], length, 2), dtype=torch.float32), *part] if stats else part


def _cuda(q, k, v, scale, layout, angles=None, neighbours=False):
    o, scratch = _like(q), _scratch(q, (q.shape[2],), layout, stats=False)
    tensors = (*map(whole_vectors, (q, k, v)), o, *scratch, angles)
    run_cuda("divided_attention_fwd_cuda", tensors, scale, layout, neighbours)
    return o


def _bwd_cuda(grad_o, q, k, v, scale, layout, angles=None, neighbours=False):
    grads = _like(q), _like(k), _like(v)
    scratch = _scratch(q, (q.shape[2], k.shape[2], k.shape[2]), layout, stats=True)
    tensors = (*map(whole_vectors, (grad_o, q, k, v)), *grads, *scratch, angles)
    run_cuda("divided_attention_bwd_cuda", tensors, scale, layout, neighbours)
    return grads


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.layout, angles, ctx.neighbours = inputs
    ctx.save_for_backward(q, k, v, angles)


def _backward(ctx, grad_o):
    q, k, v, angles = ctx.saved_tensors
    turn = () if angles is None else (angles, ctx.neighbours)
    grads = op("divided_attention_bwd", ctx.backend)(grad_o, q, k, v, ctx.scale, ctx.layout, *turn)
    return *grads, None, None, None, None


def _bwd_fake(grad_o, q, k, v, scale, layout, angles=None, neighbours=False):
    return _like(q), _like(k), _like(v)


def _bwd_cpu(grad_o, q, k, v, scale, layout, angles=None, neighbours=False):
    refuse_angles(angles)
    grads = fresh((_like(q), _like(k), _like(v)))
    inputs = [ref(unit_stride(x)) for x in (grad_o, q, k, v)]
    native().divided_attention_bwd(*inputs, *map(ref, grads), scale, layout)
    return grads


_TRITON = "vkernels.ops.divided_attention.triton"
_REST = "float scale, int[] layout, Tensor? angles=None, bool neighbours=False"

register(
    "divided_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_REST}) -> Tensor",
    fake=_fake,
    backends={"cpu": _cpu, "cuda": _cuda, "triton": lazily(_TRITON, "forward")},
    backward=_backward,
    setup_context=_setup_context,
)
register(
    "divided_attention_bwd",
    f"(Tensor grad_o, Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    backends={"cpu": _bwd_cpu, "cuda": _bwd_cuda, "triton": lazily(_TRITON, "backward")},
)
