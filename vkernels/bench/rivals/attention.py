"""Attention: SDPA's kernels with a dense mask or their own causal one, permute + SDPA + permute where a mask is many
small problems, gather + SDPA + scatter where tokens are dropped, compiled FlexAttention, flash-attn, xformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vkernels import MaskPlan, VideoMask
from vkernels.bench import rivals as room
from vkernels.bench.problem import Call, Problem
from vkernels.bench.rivals.sdpa import GPU_ONLY, KERNELS, tokens_first
from vkernels.ops.attention.reference import dense

LARGEST_MASK = 4 << 30  # elements of a dense mask nobody would build


@dataclass(frozen=True)
class Asked:
    """What a call of ours asks for, as a rival has to see it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    plan: MaskPlan | None
    scale: float | None
    causal: bool

    @property
    def plain(self) -> bool:
        """No mask but what every kernel has itself."""
        return self.plan is None or self.causal

    @property
    def grouped(self) -> bool:
        """Many small problems."""
        return self.plan is not None and not self.causal and self.plan.groups > 1 and self.plan.ranges is None


def asked(problem: Problem) -> Asked | None:
    if problem.kwargs.get("rope") is not None:
        return None
    q, k, v = (problem.kwargs[x] for x in "qkv")
    mask, scale = problem.kwargs.get("mask"), problem.kwargs.get("scale")
    plan = mask.plan(q.device) if isinstance(mask, VideoMask) else mask
    causal = mask == VideoMask.causal(q.shape[1]) if isinstance(mask, VideoMask) else False
    return Asked(q, k, v, mask, plan, scale, causal)


def _by_groups(q: Any, k: Any, v: Any, plan: MaskPlan, kernel: str, scale: float | None) -> torch.Tensor:
    """Every group a sequence of its own: tokens copied to it, and back."""
    lengths = (plan.len_q, plan.len_k, plan.len_k)
    strides = (plan.q_stride, plan.k_stride, plan.k_stride)

    def grouped(x: torch.Tensor, length: int, stride: tuple[int, int]) -> torch.Tensor:
        if stride[0] == 1:
            return x.unflatten(1, (length, plan.groups)).transpose(1, 2).flatten(0, 1).contiguous()
        return x.unflatten(1, (plan.groups, length)).flatten(0, 1)

    q_s, k_s, v_s = (grouped(x, n, stride) for x, n, stride in zip((q, k, v), lengths, strides, strict=True))
    out = tokens_first(q_s, k_s, v_s, kernel, scale=scale).unflatten(0, (q.shape[0], plan.groups))
    return (out.transpose(1, 2) if plan.q_stride[0] == 1 else out).reshape(q.shape)


def _drops_only(plan: MaskPlan) -> bool:
    """Kept tokens see all kept tokens: what a user can still do by hand."""
    rows = plan.q_rows if plan.q_rows is not None else plan.k_rows
    return plan.ranges is None and plan.box is None and rows is not None and rows.shape[0] == 1


def _gathered(q: Any, k: Any, v: Any, plan: MaskPlan, scale: float | None) -> Call:
    def live(rows: torch.Tensor | None, count: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else rows[0, : None if count is None else int(count[0])].long()

    at, key = live(plan.q_rows, plan.q_count), live(plan.k_rows, plan.k_count)

    def call() -> torch.Tensor:
        q_s, k_s, v_s = (x if i is None else x.index_select(1, i) for x, i in ((q, at), (k, key), (v, key)))
        out = tokens_first(q_s, k_s, v_s, None, scale=scale)
        return out if at is None else torch.zeros_like(q).index_copy(1, at, out)

    return call


def _masked(a: Asked, kernel: str) -> Call:
    visible = dense(a.mask, a.q.device)[:, None]
    sees = visible.any(-1, keepdim=True)  # a row that sees nothing is NaN in SDPA and 0 in ours
    blind, visible, sees = not bool(sees.all()), visible | ~sees, sees.transpose(1, 2)

    def call() -> torch.Tensor:
        out = tokens_first(a.q, a.k, a.v, kernel, scale=a.scale, attn_mask=visible)
        return torch.where(sees, out, 0.0) if blind else out

    return call


def _plain(kernel: str) -> room.Prepare:
    def prepared(problem: Problem) -> Call | None:
        a = asked(problem)
        if a is None or not a.plain:
            return None
        return lambda: tokens_first(a.q, a.k, a.v, kernel, scale=a.scale, is_causal=a.causal)

    return prepared


def _permuted(kernel: str) -> room.Prepare:
    def prepared(problem: Problem) -> Call | None:
        a = asked(problem)
        if a is None or a.plan is None or not a.grouped:
            return None
        plan = a.plan
        return lambda: _by_groups(a.q, a.k, a.v, plan, kernel, a.scale)

    return prepared


def _with_mask(kernel: str) -> room.Prepare:
    def prepared(problem: Problem) -> Call | None:
        a = asked(problem)
        if a is None or a.plain or a.grouped:
            return None
        if a.q.shape[1] * a.k.shape[1] > LARGEST_MASK:
            raise room.Cannot(f"a dense mask of {a.q.shape[1]:,} x {a.k.shape[1]:,} is more than anybody would build")
        return _masked(a, kernel)

    return prepared


for kernel in KERNELS:
    gpu = kernel in GPU_ONLY
    room.rival(f"SDPA {kernel}", "attention", gpu=gpu)(_plain(kernel))
    room.rival(f"permute + SDPA {kernel} + permute", "attention", gpu=gpu)(_permuted(kernel))
    room.rival(f"SDPA {kernel}, dense mask", "attention", gpu=gpu)(_with_mask(kernel))


@room.rival("SDPA by hand: gather, attend, scatter", "attention")
def by_hand(problem: Problem) -> Call | None:
    a = asked(problem)
    if a is None or a.plan is None or a.causal or a.grouped or not _drops_only(a.plan):
        return None
    return _gathered(a.q, a.k, a.v, a.plan, a.scale)


def _predicate(problem: Problem, mask: Any, device: torch.device) -> Callable[..., Any]:
    if problem.visible is not None:
        return problem.visible
    visible = dense(mask, device)
    sample = visible.shape[0] > 1
    return lambda b, h, q, k: visible[b if sample else 0, q, k]


def _flex(problem: Problem, each_time: bool) -> Call | None:
    a = asked(problem)
    if a is None or a.mask is None or a.causal:
        return None
    rule = _predicate(problem, a.mask, a.q.device)
    run = room.compiled(flex_attention)
    gqa = a.q.shape[2] != a.k.shape[2]

    def blocks() -> Any:
        return create_block_mask(rule, a.q.shape[0], None, a.q.shape[1], a.k.shape[1], device=str(a.q.device))

    kept = None if each_time else blocks()

    def call() -> torch.Tensor:
        heads = (x.transpose(1, 2) for x in (a.q, a.k, a.v))
        mask = blocks() if kept is None else kept
        return run(*heads, block_mask=mask, scale=a.scale, enable_gqa=gqa).transpose(1, 2)

    return call


@room.rival("FlexAttention, compiled", "attention", compiles=True)
def flex(problem: Problem) -> Call | None:
    return _flex(problem, each_time=False)


@room.rival("FlexAttention, compiled, and its mask each time", "attention", compiles=True)
def flex_and_mask(problem: Problem) -> Call | None:
    return _flex(problem, each_time=True)


@room.rival("flash-attn", "attention", gpu=True)
def flash_attn(problem: Problem) -> Call | None:
    a = asked(problem)
    if a is None or not a.plain:
        return None
    room.needs("flash_attn", "flash-attn")
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(a.q, a.k, a.v, softmax_scale=a.scale, causal=a.causal)


@room.rival("xformers", "attention", gpu=True)
def xformers(problem: Problem) -> Call | None:
    a = asked(problem)
    if a is None or not a.plain:
        return None
    room.needs("xformers", "xformers")
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if a.causal else None
    share = a.q.shape[2] // max(a.k.shape[2], 1)  # grouped heads are its BMGHK: keys expanded over a group's heads
    groups = a.q.unflatten(2, (a.k.shape[2], share)) if share > 1 else a.q
    k, v = (x[:, :, :, None].expand(-1, -1, -1, share, -1) if share > 1 else x for x in (a.k, a.v))

    def call() -> Any:
        return memory_efficient_attention(groups, k, v, attn_bias=bias, scale=a.scale).view(a.q.shape)

    return call


def _blocks(problem: Problem, make: Callable[..., Any]) -> Call:
    s = problem.kwargs["mask"]().tokens
    return lambda: make(problem.visible, None, None, s, s, device=str(problem.kwargs["device"]))


@room.rival("create_block_mask", "lower_mask", compare=False)
def block_mask(problem: Problem) -> Call:
    return _blocks(problem, create_block_mask)


@room.rival("create_block_mask, compiled", "lower_mask", compare=False, compiles=True)
def fast_block_mask(problem: Problem) -> Call:
    return _blocks(problem, room.compiled(create_block_mask))
