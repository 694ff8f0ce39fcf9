"""Peak memory of a call: what torch's allocator handed out above what was there before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class MemoryProbe:
    """Peak of every stage on the CPU, in bytes.

    Read from the allocator's own record in the torch profiler, so temporaries inside operators count too. Scratch that
    native code keeps per thread does not pass through that allocator; it is a few hundred kilobytes.
    """

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            yield
        held = peak = 0
        events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        self.peak[name] = peak


def peak_mb(call: Callable[[], Any], device: str = "cpu") -> float:
    """Peak of one run of `call`, in MB."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    probe = MemoryProbe()
    with probe("call"):
        call()
    return probe.peak["call"] / 1e6
