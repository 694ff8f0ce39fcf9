"""Two ranks against one process, a core each: python -m benchmarks.distributed [--tokens 32768] [--ranks 2]

A frame-causal forward pass on the CPU (gloo on loopback), one thread per process, alternating, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vkernels as vk
from vkernels import distributed as vd

HEADS, HEAD = 2, 64


def _time(run: Any, ranks: int) -> float:
    if ranks > 1:
        dist.barrier()
    begin = time.perf_counter()
    run()
    if ranks > 1:
        dist.barrier()
    return time.perf_counter() - begin


def _work(rank: int, ranks: int, tokens: int, rounds: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mask = vk.VideoMask.frame_causal(vk.Grid(tokens // 256, 16, 16))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens, HEADS, HEAD).unbind()
    shards = vd.plan_shards(mask, ranks)
    mine = [vd.scatter_tokens(x, shards) for x in (q, k, v)]
    alone, together = [], []
    with torch.no_grad():
        want = vk.attention(q, k, v, mask=mask) if rank == 0 else None
        got = vd.gather_tokens(vd.attention(*mine, shards, scheme="ring"), shards)
        if want is not None and not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
            raise AssertionError("the ranks' answer differs from one process's; nothing is timed")
        for _ in range(rounds):
            dist.barrier()
            if rank == 0:
                alone.append(_time(lambda: vk.attention(q, k, v, mask=mask), 1))
            dist.barrier()
            together.append(_time(lambda: vd.attention(*mine, shards, scheme="ring"), ranks))
    if rank == 0:
        results.put((alone, together, shards.imbalance))
    dist.destroy_process_group()


def measure(tokens: int, ranks: int, rounds: int) -> dict[str, float]:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (ranks, tokens, rounds, f"{folder}/store", results), ranks)
    alone, together, imbalance = results.get()
    ratios = sorted(a / b for a, b in zip(alone, together, strict=True))
    return {
        "tokens": tokens,
        "ranks": ranks,
        "alone_s": statistics.median(alone),
        "together_s": statistics.median(together),
        "speed_up": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "imbalance": imbalance,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.tokens, options.ranks, options.rounds), indent=2))
