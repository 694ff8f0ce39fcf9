"""How a call is timed: samples of seconds per call, warm or cold, by the host's clock or by the GPU's events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vkernels.bench.problem import Call

LEAST, MOST = 5, 40  # rounds of one measurement
MIN_SAMPLE_S = 2e-3  # a warm sample repeats its call until it lasts this long
SLOW_CALL_S = 1.0
LONGEST_HOST_S = 5e-3  # what needs longer than this to be enqueued is slow for that reason, and may look so


class EventTimer:
    """GPU time between two events. The GPU is kept busy for longer than the host needed to prepare the calls of the
    round before, so that the host's time is not counted; a cold sample finds the L2 cache overwritten."""

    def __init__(self, device: str = "cuda"):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._trash = torch.empty(max(4 * l2, 64 << 20), dtype=torch.int8, device=device)
        self._host_s = LONGEST_HOST_S

    def _marked(self, call: Call, loops: int = 1, cold: bool = True) -> tuple[Any, Any, float]:
        """The events around `loops` calls, and the time the host took to prepare them."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        if cold:
            self._trash.zero_()
        torch.cuda._sleep(int(2e9 * min(1.5 * self._host_s + 1e-4, LONGEST_HOST_S)))
        begin.record()
        start = time.perf_counter()
        for _ in range(loops):
            call()
        host_s = time.perf_counter() - start
        end.record()
        return begin, end, host_s

    def sample(self, call: Call, loops: int = 1, cold: bool = False) -> float:
        """Seconds per call."""
        begin, end, self._host_s = self._marked(call, loops, cold)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / loops

    def rounds(self, calls: Sequence[Call], count: int) -> list[list[float]]:
        """Milliseconds [call][round]; every round runs each call once, in turn, cold."""
        marks = []
        for _ in range(count):
            made = [self._marked(call) for call in calls]
            self._host_s = max(host_s for _, _, host_s in made)
            marks += [(begin, end) for begin, end, _ in made]
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in marks]
        return [times[i :: len(calls)] for i in range(len(calls))]


class WallTimer:
    """The same by the host's clock, for the CPU."""

    def __init__(self, device: str = "cpu"):
        self._trash: torch.Tensor | None = None

    def sample(self, call: Call, loops: int = 1, cold: bool = False) -> float:
        if cold:
            if self._trash is None:
                self._trash = torch.zeros(4 * last_level_cache(), dtype=torch.int8)
            self._trash.add_(1)
        start = time.perf_counter()
        for _ in range(loops):
            call()
        return (time.perf_counter() - start) / loops

    def rounds(self, calls: Sequence[Call], count: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(count):
            for made, call in zip(times, calls, strict=True):
                made.append(self.sample(call) * 1e3)
        return times


Timer = EventTimer | WallTimer


def timer_for(device: str) -> Timer:
    return EventTimer(device) if device.startswith("cuda") else WallTimer(device)


def last_level_cache() -> int:
    """Bytes; 64 MiB where the system does not say."""
    sizes = [64 << 10]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes) if len(sizes) > 1 else 64 << 20


def captured(call: Call) -> Call:
    """`call` as the replay of a CUDA graph. Raises where it cannot be one: it asks the device for a value, or allocates
    in a way that graphs refuse."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()  # its outputs live as long as the graph that writes them

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def replayed(call: Call) -> Call:
    """`call` as the replay of a CUDA graph, so that the host's time is in no sample; itself where it cannot be one."""
    try:
        return captured(call)
    except RuntimeError:  # others are faults of the call itself
        torch.cuda.synchronize()
        return call


def loops_for(timer: Timer, call: Call) -> int:
    """Calls in one warm sample, after one to warm up; a slow call is not made again to find that out."""
    once = timer.sample(call)
    if once < SLOW_CALL_S:
        once = timer.sample(call)
    return max(1, min(1000, round(MIN_SAMPLE_S / max(once, 1e-7))))


def in_turn(timer: Timer, calls: Sequence[Call], seconds: float) -> list[list[float]]:
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


def ceilings(device: str, timer: Timer, *, copy_bytes: int = 1 << 30, size: int = 8192) -> dict[str, Any]:
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
