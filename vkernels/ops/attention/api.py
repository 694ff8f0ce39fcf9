"""attention: the public door."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vkernels.check import bind, refusal, require, same_dtype
from vkernels.dispatch import Backend, choose, like
from vkernels.library import cpu_why_not, cuda_why_not, op, shared_why_not, triton_why_not
from vkernels.masks import MaskPlan, VideoMask
from vkernels.ops.apply_rope import api as rotation
from vkernels.ops.attention import reference, torch_op
from vkernels.remember import remembered


class Call(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: VideoMask | MaskPlan | None
    scale: float
    rope: Any
    return_lse: bool
    turning: rotation.Decision | None = None
    doors: dict[str, Any] | None = None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: VideoMask | MaskPlan | None = None,
    scale: float | None = None,
    rope: Any = None,
    return_lse: bool = False,
) -> Call:
    axes = bind("attention", ("q", q, "b s_q n d"), ("k", k, "b s_k m d"), ("v", v, "b s_k m d"))
    same_dtype("attention", ("q", q), ("k", k), ("v", v))
    n, m, d = axes["n"], axes["m"], axes["d"]
    require(d >= 1, "attention", "q", "have a head size of at least 1", d)
    require(n % m == 0 if m else n == 0, "attention", "q", f"have a multiple of the {m} key heads as heads", n)
    if scale is None:
        scale = 1.0 / math.sqrt(d)
    require(isinstance(scale, (int, float)) and math.isfinite(scale), "attention", "scale", "be a finite number", scale)
    if mask is not None:
        _check_mask(mask, axes)
    if rope is not None:
        pair = isinstance(rope, tuple) and len(rope) == 2
        require(pair, "attention", "rope", "be a pair (spec, positions)", type(rope).__name__, TypeError)
    return Call(q, k, v, mask, float(scale), rope, return_lse)


def _check_mask(mask: VideoMask | MaskPlan, axes: dict[str, int]) -> None:
    if isinstance(mask, VideoMask):
        s_q = s_k = mask.tokens
        p = mask.samples
    elif isinstance(mask, MaskPlan):
        s_q, s_k = mask.s_q, mask.s_k
        p = max([1, *(x.shape[0] for x in (mask.q_rows, mask.k_rows, mask.ranges) if x is not None)])
    else:
        raise TypeError(refusal("attention", "mask", "be a VideoMask or a MaskPlan", type(mask).__name__))
    tokens = (axes["s_q"], axes["s_k"])
    require((s_q, s_k) == tokens, "attention", "mask", f"speak of {tokens[0]} x {tokens[1]} tokens", f"{s_q} x {s_k}")
    require(p in (1, axes["b"]), "attention", "mask", f"be given for 1 or {axes['b']} samples", p)


@remembered
def _decide(
    q, k, v, form, scale, rope, return_lse, backend, *, mask
) -> tuple[Backend, float, rotation.Decision | None, dict[str, Any]]:
    """(backend, scale, how q and k are turned, doors). `form` is what the mask looks like."""
    call = prepare(q, k, v, mask=mask, scale=scale, rope=rope, return_lse=return_lse)
    chosen = choose("attention", BACKENDS, backend, call)
    turning = None if rope is None else rotation.decide(q, k, *rope, False, False, "exact", chosen.name)
    return chosen, call.scale, turning, {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: VideoMask | MaskPlan | None = None,
    scale: float | None = None,
    rope: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from queries to the keys a video mask lets them see: softmax(scale * q k^T) v.

    No tensor of s_q x s_k is ever made: a mask costs O(s) memory, and what it hides costs no time. Any strides do, so a
    transposed view of (b n s d) is as good as (b s n d).

    Args:
        q:          queries (b s_q n d); float32, bfloat16 or float16
        k:          keys (b s_k m d), n a multiple of m: each key head serves n / m query heads in a row
        v:          values (b s_k m d)
        mask:       a VideoMask, or its MaskPlan; None: every query sees every key
        scale:      what scores are multiplied by; None: 1 / sqrt(d)
        rope:       (spec, positions): q and k are rotated by apply_rope first
        return_lse: also return the logarithm of the sum of exponentials
        backend:    "cpu", "cuda", "triton", "reference"; None takes the first that can run
    Returns:
        output (b s_q n d) in the dtype of q, computed in float32; with return_lse also lse (b n s_q), natural
        logarithm, float32 (float64 for float64 inputs). A query that sees no key gets output 0 and lse -inf.
    Raises:
        ShapeError, TypeError, ValueError, NoBackend
    Gradients: q, k, v, through the output and through lse; 0 where nothing is seen.   Deterministic: yes, both ways.
    Example:
        >>> grid = vk.Grid(8, 16, 16)
        >>> q, k, v = torch.randn(3, 1, grid.tokens, 16, 64).unbind()
        >>> vk.attention(q, k, v, mask=vk.VideoMask.frame_causal(grid)).shape
        torch.Size([1, 2048, 16, 64])
    Source: online softmax in tiles after FlashAttention, arXiv:2205.14135.
    """
    form = mask.form(q) if isinstance(mask, (VideoMask, MaskPlan)) else mask
    chosen, scale, turning, doors = _decide(q, k, v, form, scale, rope, return_lse, backend, mask=mask)
    return chosen.run(Call(q, k, v, mask, scale, rope, return_lse, turning, doors))


def _plan(call: Call) -> MaskPlan | None:
    return call.mask.plan(call.q.device) if isinstance(call.mask, VideoMask) else call.mask


def _run(call: Call, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    q, k = call.q, call.k
    if call.turning is not None:
        q, k = rotation.turn(call.turning, q, k, *call.rope)
    if backend == "reference":
        out, lse = reference.attention(q, k, call.v, call.mask, call.scale)
    else:
        arguments = torch_op.mask_arguments(_plan(call), q.shape[1], k.shape[1])
        out, lse = op("attention_fwd", backend, call.doors)(q, k, call.v, call.scale, *arguments)
    return (out, lse) if call.return_lse else out


def _mask_why_not(call: Call) -> str | None:
    if isinstance(call.mask, MaskPlan) and call.mask.device != call.q.device:
        return f"the mask plan is on {call.mask.device}, the tensors are on {call.q.device}"
    if max(call.q.shape[1], call.k.shape[1]) > 2**30:
        return "more than 2^30 tokens in one sequence"
    return None


def _cpu_why_not(call: Call) -> str | None:
    return _mask_why_not(call) or cpu_why_not(call.q)


LARGEST_BLOCK = 103384  # bytes of shared memory, in the backward of the CUDA kernels for heads above 96


def _cuda_why_not(call: Call) -> str | None:
    if (reason := _mask_why_not(call) or cuda_why_not(call.q)) is not None:
        return reason
    if call.q.dtype == torch.float32:
        return "dtype float32 has no tensor cores of its precision, this backend serves bfloat16 and float16"
    d = call.q.shape[3]
    if d > 128 or d % 8:
        return f"the head size is {d}, this backend serves multiples of 8 up to 128"
    return shared_why_not(call.q, LARGEST_BLOCK) if d > 96 else None


def _triton_why_not(call: Call) -> str | None:
    if (reason := _mask_why_not(call) or triton_why_not(call.q)) is not None:
        return reason
    if call.q.shape[3] > 256:
        return f"the head size is {call.q.shape[3]}, this backend serves at most 256"
    plan = _plan(call)
    relations = 0 if plan is None or plan.box is None else len(plan.box.bounds)
    if relations > 4:
        return f"the mask compares {relations} attributes beyond its intervals, this backend serves at most 4"
    return None


def _kind(call: Call) -> tuple[torch.device, str]:
    """What a query sees decides the loop that runs: short groups, a window, some keys or all of them."""
    plan = _plan(call)
    if plan is None:
        sees = "all keys"
    elif plan.groups > 1 and max(plan.len_q, plan.len_k) <= 64:
        sees = "short groups"
    else:
        sees = "windows" if plan.box is not None else "all keys" if plan.ranges is None else "intervals"
    return like(call.q, None, sees)


BACKENDS = (
    Backend("cpu", _cpu_why_not, lambda call: _run(call, "cpu")),
    Backend("cuda", _cuda_why_not, lambda call: _run(call, "cuda"), _kind),
    Backend("triton", _triton_why_not, lambda call: _run(call, "triton")),
    Backend("reference", lambda call: None, lambda call: _run(call, "reference")),
)
