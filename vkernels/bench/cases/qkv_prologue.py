"""qkv_prologue against the chain Hugging Face writes: split, RMSNorm modules, apply_rotary_pos_emb with recomposed
M-RoPE tables (given, so not timed), index copy into a static cache."""

from __future__ import annotations

import torch

import vkernels as vk
from vkernels.bench.measure import Bench
from vkernels.spec import Cost

S, N, M, D = 4096, 32, 8, 128


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * y.to(x.dtype)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)


def _bench(dtype: torch.dtype) -> Bench:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, S, (N + 2 * M) * D, generator=generator).to(dtype)
    q_norm, k_norm = (torch.rand(D, generator=generator).to(dtype) + 0.5 for _ in "qk")
    spec = vk.RopeSpec.build(D, 5e6, axes="mrope_interleaved", sections=(24, 20, 20))
    pos = vk.rope_positions("qwen2_vl", [(4, 32, 32)])
    frequency = torch.tensor(spec.freq)
    angle = pos[torch.tensor(spec.axis_rows[0])].T.double() * frequency
    cos, sin = (torch.cat([t, t], -1).to(dtype)[None, None] for t in (angle.cos(), angle.sin()))
    cache = vk.KVCache("fp32" if dtype == torch.float32 else "bf16", b=1, m=M, d=D, capacity=S)
    keys, values = (torch.zeros(1, M, S, D, dtype=dtype) for _ in "kv")
    index = torch.arange(S)

    def ours() -> tuple[torch.Tensor, ...]:
        cache.reset()
        q = vk.qkv_prologue(qkv, n=N, m=M, spec=spec, pos=pos, q_norm=q_norm, k_norm=k_norm, cache=cache)
        assert cache.k_rows is not None
        assert cache.v_rows is not None
        return q.transpose(1, 2), cache.k_rows, cache.v_rows

    def rival() -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.split([N * D, M * D, M * D], dim=-1)
        q = _norm(q.view(1, S, N, D), q_norm).transpose(1, 2)
        k = _norm(k.view(1, S, M, D), k_norm).transpose(1, 2)
        v = v.view(1, S, M, D).transpose(1, 2)
        q = q * cos + _rotate_half(q) * sin
        k = k * cos + _rotate_half(k) * sin
        keys.index_copy_(2, index, k)
        values.index_copy_(2, index, v)
        return q, keys, values

    name = "norm, rotate, index_copy_"
    return Bench(
        id=f"norm + interleaved M-RoPE + cache, s={S}, n={N}, m={M}, d={D}",
        op="qkv_prologue",
        model="Qwen3-VL",
        dtype=dtype,
        ours=ours,
        rivals={name: rival},
        cost=Cost(flop=8.0 * qkv.numel(), bytes=2.0 * qkv.numel() * qkv.element_size()),
        targets={name: 10.0},
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
    )


def benches() -> list[Bench]:
    return [_bench(dtype) for dtype in (torch.float32, torch.bfloat16)]
