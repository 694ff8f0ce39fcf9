"""python -m benchmarks.launch [--op NAME ...] [--profile]: what a call costs the host before its kernel is launched.

The public function of every op with a Triton kernel is called at a small size, and the launch itself goes nowhere. The
least of many repetitions counts: what else the machine does is not the call's.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from vkernels.kv_cache import KVCache
from vkernels.spec import Maker, OpSpec, all_specs
from vkernels.triton.launch import discarding

LIMIT_US = 25.0


def repeatable(spec: OpSpec, kwargs: dict[str, Any]) -> Callable[[], Any]:
    """The call; what it adds to a cache is taken back."""
    cache = kwargs.get("cache")
    if not isinstance(cache, KVCache):
        return lambda: spec.fn(**kwargs, backend="triton")
    lengths, counts = list(cache._lengths), cache.lengths

    def call() -> None:
        cache._lengths, cache.lengths = list(lengths), counts
        spec.fn(**kwargs, backend="triton")

    return call


def calls(spec: OpSpec) -> dict[str, Callable[[], Any]]:
    """The cases of a spec that its Triton kernels run and that have anything to launch."""
    backend = next((b for b in spec.backends if b.name == "triton"), None)
    if backend is None:
        return {}
    found = {}
    for case in spec.cases:
        kwargs = case.make(Maker(torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]))
        with discarding():
            if backend.why_not(spec.prepare(**kwargs)) is None:
                found[case.id] = repeatable(spec, kwargs)
    return found


def cost_us(call: Callable[[], Any], repeats: int = 200, loops: int = 20) -> float:
    with discarding(), torch.no_grad():
        for _ in range(20):
            call()
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(loops):
                call()
            best = min(best, (time.perf_counter() - start) / loops)
    return best * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch", description=__doc__)
    parser.add_argument("--op", nargs="*", default=[])
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    arguments = parser.parse_args()
    over = 0
    for spec in all_specs():
        if arguments.op and spec.name not in arguments.op:
            continue
        for name, call in calls(spec).items():
            cost = cost_us(call)
            over += cost > LIMIT_US
            print(f"{spec.name:20} {name:24} {cost:7.1f} us{'  over' if cost > LIMIT_US else ''}", flush=True)
            if arguments.profile:
                profile = cProfile.Profile()
                with discarding(), torch.no_grad():
                    profile.runcall(lambda call=call: [call() for _ in range(2000)])
                pstats.Stats(profile).sort_stats("tottime").print_stats(18)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
