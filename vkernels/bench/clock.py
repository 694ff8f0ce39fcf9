"""How calls are timed: in turn, cold caches, random data. docs/benchmarking.md says why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

Call = Callable[[], Any]
LEAST, MOST = 5, 40  # rounds of one measurement
LONGEST_HOST_S = 5e-3  # what needs longer than this to be enqueued is slow for that reason, and may look so


class EventTimer:
    """GPU time between two events. Before each call the L2 cache is overwritten, and the GPU kept busy for longer than
    the host needed to prepare the calls of the round before, so that the host's time is not counted."""

    def __init__(self, device: str = "cuda"):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._trash = torch.empty(max(4 * l2, 64 << 20), dtype=torch.int8, device=device)
        self._host_s = LONGEST_HOST_S

    def rounds(self, calls: Sequence[Call], count: int) -> list[list[float]]:
        """Milliseconds [call][round]; every round runs each call once, in turn."""
        marks = []
        for _ in range(count):
            slowest = 0.0
            for call in calls:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
                self._trash.zero_()
                torch.cuda._sleep(int(2e9 * min(1.5 * self._host_s + 1e-4, LONGEST_HOST_S)))
                begin.record()
                start = time.perf_counter()
                call()
                slowest = max(slowest, time.perf_counter() - start)
                end.record()
                marks.append((begin, end))
            self._host_s = slowest
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in marks]
        return [times[i :: len(calls)] for i in range(len(calls))]


class WallTimer:
    """The same by the host's clock, for the CPU: how these programs are tested without a GPU."""

    def __init__(self, device: str = "cpu"):
        self.device = device

    def rounds(self, calls: Sequence[Call], count: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(count):
            for made, call in zip(times, calls, strict=True):
                start = time.perf_counter()
                call()
                made.append((time.perf_counter() - start) * 1e3)
        return times


def timer_for(device: str) -> EventTimer | WallTimer:
    return EventTimer(device) if device.startswith("cuda") else WallTimer(device)


def in_turn(timer: Any, calls: Sequence[Call], seconds: float) -> list[list[float]]:
    """As many rounds as fit `seconds`, after two to warm up."""
    timer.rounds(calls, 1)
    start = time.perf_counter()
    timer.rounds(calls, 1)
    once = time.perf_counter() - start
    return timer.rounds(calls, max(LEAST, min(MOST, int(seconds / max(once, 1e-6)))))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 5], ordered[(4 * len(ordered)) // 5]


def ceilings(device: str, timer: Any, *, copy_bytes: int = 1 << 30, size: int = 8192) -> dict[str, Any]:
    """The machine's two limits, measured: bytes a copy moves per second, bf16 operations a product makes per second."""
    source = torch.empty(copy_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy_ms = spread(in_turn(timer, [partial(target.copy_, source)], 0.5)[0])
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in "ab")
    product_ms = spread(in_turn(timer, [partial(torch.mm, a, b)], 0.5)[0])
    return {
        "copy_gb_per_s": 2 * copy_bytes / copy_ms[0] / 1e6,
        "copy_bytes": copy_bytes,
        "copy_ms": copy_ms,
        "bf16_tflop_per_s": 2 * size**3 / product_ms[0] / 1e9,
        "product_size": size,
        "product_ms": product_ms,
    }
