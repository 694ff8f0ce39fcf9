"""Attention: SDPA's kernels with a dense mask or their own causal one, permute + SDPA + permute where a mask is many
small problems, gather + SDPA + scatter where tokens are dropped, compiled FlexAttention, flash-attn, xformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu import rivals as room
from benchmarks.gpu.cases import Race
from benchmarks.gpu.rivals.sdpa import KERNELS, tokens_first
from vkernels import MaskPlan, VideoMask
from vkernels.ops.attention.reference import dense

LARGEST_MASK = 4 << 30  # elements of a dense mask nobody would build

Prepared = Iterator[tuple[str, Callable[[], room.Rival]]]


def rivals(race: Race, kwargs: dict[str, Any]) -> Prepared:
    if race.op == "lower_mask":
        yield from _lowering(race, kwargs)
        return
    if kwargs.get("rope") is not None:
        return
    q, k, v, mask, scale = (kwargs.get(x) for x in ("q", "k", "v", "mask", "scale"))
    assert isinstance(q, torch.Tensor)
    assert isinstance(k, torch.Tensor)
    assert isinstance(v, torch.Tensor)
    plan = mask.plan(q.device) if isinstance(mask, VideoMask) else mask
    causal = mask == VideoMask.causal(q.shape[1]) if isinstance(mask, VideoMask) else False

    def one(name: str, call: Callable[[], Any]) -> tuple[str, Callable[[], room.Rival]]:
        return name, lambda: room.Rival(name, call)

    if plan is None or causal:
        for kernel in KERNELS:
            yield one(f"SDPA {kernel}", lambda x=kernel: tokens_first(q, k, v, x, scale=scale, is_causal=causal))
        yield from _libraries(q, k, v, scale, causal)
    elif plan.groups > 1 and plan.ranges is None:
        for kernel in KERNELS:
            yield one(f"permute + SDPA {kernel} + permute", lambda x=kernel: _by_groups(q, k, v, plan, x, scale))
    else:
        if _drops_only(plan):
            yield "SDPA by hand: gather, attend, scatter", lambda: _gathered(q, k, v, plan, scale)
        if q.shape[1] * k.shape[1] <= LARGEST_MASK:
            for kernel in ("efficient", "cuDNN"):
                yield f"SDPA {kernel}, dense mask", lambda x=kernel: _masked(q, k, v, mask, scale, x)
    if mask is not None and not causal:
        yield "FlexAttention, compiled", lambda: _flex(race, q, k, v, mask, scale)


def _by_groups(q: Any, k: Any, v: Any, plan: MaskPlan, kernel: str, scale: float | None) -> torch.Tensor:
    """Every group a sequence of its own: tokens copied to it, and back."""
    lengths = (plan.len_q, plan.len_k, plan.len_k)
    strides = (plan.q_stride, plan.k_stride, plan.k_stride)

    def grouped(x: torch.Tensor, length: int, stride: tuple[int, int]) -> torch.Tensor:
        if stride[0] == 1:
            return x.unflatten(1, (length, plan.groups)).transpose(1, 2).flatten(0, 1).contiguous()
        return x.unflatten(1, (plan.groups, length)).flatten(0, 1)

    parts = [grouped(x, n, stride) for x, n, stride in zip((q, k, v), lengths, strides, strict=True)]
    out = tokens_first(*parts, kernel, scale=scale).unflatten(0, (q.shape[0], plan.groups))
    return (out.transpose(1, 2) if plan.q_stride[0] == 1 else out).reshape(q.shape)


def _drops_only(plan: MaskPlan) -> bool:
    """Kept tokens see all kept tokens: what a user can still do by hand."""
    rows = plan.q_rows if plan.q_rows is not None else plan.k_rows
    return plan.ranges is None and plan.box is None and rows is not None and rows.shape[0] == 1


def _gathered(q: Any, k: Any, v: Any, plan: MaskPlan, scale: float | None) -> room.Rival:
    def live(rows: torch.Tensor | None, count: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else rows[0, : None if count is None else int(count[0])].long()

    at, key = live(plan.q_rows, plan.q_count), live(plan.k_rows, plan.k_count)

    def call() -> torch.Tensor:
        kept = [x if i is None else x.index_select(1, i) for x, i in ((q, at), (k, key), (v, key))]
        out = tokens_first(*kept, None, scale=scale)
        return out if at is None else torch.zeros_like(q).index_copy(1, at, out)

    return room.Rival("SDPA by hand: gather, attend, scatter", call)


def _masked(q: Any, k: Any, v: Any, mask: Any, scale: float | None, kernel: str) -> room.Rival:
    visible = dense(mask, q.device)[:, None]
    sees = visible.any(-1, keepdim=True)  # a row that sees nothing is NaN in SDPA and 0 in ours
    blind, visible, sees = not bool(sees.all()), visible | ~sees, sees.transpose(1, 2)

    def call() -> torch.Tensor:
        out = tokens_first(q, k, v, kernel, scale=scale, attn_mask=visible)
        return torch.where(sees, out, 0.0) if blind else out

    return room.Rival(f"SDPA {kernel}, dense mask", call)


def _predicate(race: Race, mask: Any, device: torch.device) -> Callable[..., Any]:
    if race.visible is not None:
        return race.visible
    visible = dense(mask, device)
    sample = visible.shape[0] > 1
    return lambda b, h, q, k: visible[b if sample else 0, q, k]


def _flex(race: Race, q: Any, k: Any, v: Any, mask: Any, scale: float | None) -> room.Rival:
    rule = _predicate(race, mask, q.device)
    blocks = create_block_mask(rule, q.shape[0], None, q.shape[1], k.shape[1], device=str(q.device))
    run = room.compiled(flex_attention)
    gqa = q.shape[2] != k.shape[2]

    def call() -> torch.Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return run(*heads, block_mask=blocks, scale=scale, enable_gqa=gqa).transpose(1, 2)

    return room.Rival("FlexAttention, compiled", call)


def _libraries(q: Any, k: Any, v: Any, scale: float | None, causal: bool) -> Prepared:
    if room.installed("flash_attn"):
        from flash_attn import flash_attn_func

        yield (
            "flash-attn",
            lambda: room.Rival("flash-attn", lambda: flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)),
        )
    if room.installed("xformers"):
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        bias = LowerTriangularMask() if causal else None
        share = q.shape[2] // max(k.shape[2], 1)  # grouped heads are its BMGHK: keys expanded over a group's heads
        groups = q.unflatten(2, (k.shape[2], share)) if share > 1 else q
        k_all, v_all = (x[:, :, :, None].expand(-1, -1, -1, share, -1) if share > 1 else x for x in (k, v))

        def call() -> Any:
            out = memory_efficient_attention(groups, k_all, v_all, attn_bias=bias, scale=scale)
            return out.view(q.shape)

        yield "xformers", lambda: room.Rival("xformers", call)


def _lowering(race: Race, kwargs: dict[str, Any]) -> Prepared:
    s = kwargs["mask"]().tokens
    assert race.visible is not None

    def call(make: Callable[..., Any]) -> Any:
        return make(race.visible, None, None, s, s, device=str(kwargs["device"]))

    yield "create_block_mask", lambda: room.Rival("create_block_mask", lambda: call(create_block_mask), False)

    def fast() -> room.Rival:
        make = room.compiled(create_block_mask)
        return room.Rival("create_block_mask, compiled", lambda: call(make), False)

    yield "create_block_mask, compiled", fast
