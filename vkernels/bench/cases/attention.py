"""attention against SDPA (with the dense mask where there is one) and compiled FlexAttention. n = 16, d = 64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import vkernels as vk
from vkernels.bench.measure import Bench
from vkernels.spec import Cost

N, D = 16, 64
DTYPES = (torch.float32, torch.bfloat16)


def _qkv(s: int, dtype: torch.dtype, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, s, N, D, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def _cost(q: torch.Tensor, pairs: int, passes: float = 1.0) -> Cost:
    return Cost(flop=4.0 * pairs * N * D * passes, bytes=4.0 * q.numel() * q.element_size() * passes)


def _flex(s: int, frame: int) -> Callable[..., torch.Tensor]:
    block_mask = create_block_mask(lambda b, h, q, k: k // frame <= q // frame, None, None, s, s, device="cpu")
    compiled = torch.compile(flex_attention)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask).transpose(1, 2)

    return run


def _joint(dtype: torch.dtype) -> Bench:
    q, k, v = _qkv(2048, dtype)
    return Bench(
        id="joint, 2,048 tokens, no mask",
        op="attention",
        dtype=dtype,
        ours=lambda: vk.attention(q, k, v),
        rivals={"SDPA": lambda: _sdpa(q, k, v)},
        cost=_cost(q, 2048 * 2048),
        targets={"SDPA": 1.15 if dtype == torch.float32 else 1.7},
    )


def _frame_causal(dtype: torch.dtype, t: int, h: int, w: int, sdpa: float, flex: float) -> Bench:
    grid = vk.Grid(t, h, w)
    mask, s = vk.VideoMask.frame_causal(grid), t * h * w
    q, k, v = _qkv(s, dtype)
    dense = mask.dense()
    flex_call = _flex(s, h * w)
    mask.plan(q.device)
    return Bench(
        id=f"frame-causal, T={t}, L={h * w}, forward",
        op="attention",
        dtype=dtype,
        ours=lambda: vk.attention(q, k, v, mask=mask),
        rivals={
            "SDPA, dense mask": lambda: _sdpa(q, k, v, dense),
            "FlexAttention, compiled": lambda: flex_call(q, k, v),
        },
        cost=_cost(q, int(dense.sum())),
        targets={"SDPA, dense mask": sdpa, "FlexAttention, compiled": flex},
    )


def _frame_causal_backward(dtype: torch.dtype) -> Bench:
    grid = vk.Grid(8, 16, 16)
    mask = vk.VideoMask.frame_causal(grid)
    q, k, v = _qkv(2048, dtype, grad=True)
    dense = mask.dense()
    g = torch.randn(1, 2048, N, D, generator=torch.Generator().manual_seed(1)).to(dtype)

    def both(call: Callable[[], torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run() -> tuple[torch.Tensor, ...]:
            out = call()
            return out, *torch.autograd.grad(out, (q, k, v), g)

        return run

    return Bench(
        id="frame-causal, T=8, L=256, forward + backward",
        op="attention",
        dtype=dtype,
        ours=both(lambda: vk.attention(q, k, v, mask=mask)),
        rivals={"SDPA, dense mask": both(lambda: _sdpa(q, k, v, dense))},
        cost=_cost(q, int(dense.sum()), passes=3.5),
        targets={"SDPA, dense mask": 2.0 if dtype == torch.float32 else 2.5},
    )


def _keep(dtype: torch.dtype, share: float, queries: bool, target: float) -> Bench:
    s = 4096
    keep = torch.rand(s, generator=torch.Generator().manual_seed(2)) < share
    mask = vk.VideoMask.joint(vk.Grid(16, 16, 16)).keep(keep, queries=queries)
    q, k, v = _qkv(s, dtype)
    key_mask = keep[None, :].expand(s, s)
    kept = int(keep.sum())

    def rival() -> torch.Tensor:
        out = _sdpa(q, k, v, key_mask)
        return out * keep[None, :, None, None] if queries else out

    what = "tokens" if queries else "keys only"
    return Bench(
        id=f"keep {share:.0%} of 4,096, {what}",
        op="attention",
        dtype=dtype,
        ours=lambda: vk.attention(q, k, v, mask=mask),
        rivals={"SDPA, dense mask": rival},
        cost=_cost(q, (kept if queries else s) * kept),
        targets={"SDPA, dense mask": target},
    )


def _bench_pairs() -> Iterator[Bench]:
    for dtype in DTYPES:
        half = dtype == torch.bfloat16
        yield _joint(dtype)
        yield _frame_causal(dtype, 8, 16, 16, 3.0 if half else 2.1, 6.0 if half else 4.0)
        yield _frame_causal(dtype, 32, 8, 8, 3.2 if half else 2.3, 6.0 if half else 4.0)
        yield _frame_causal_backward(dtype)
        yield _keep(dtype, 0.5, True, 6.0 if half else 4.0)
        yield _keep(dtype, 0.25, True, 20.0 if half else 14.0)
        yield _keep(dtype, 0.5, False, 3.5 if half else 2.2)


def benches() -> list[Bench]:
    return list(_bench_pairs())
