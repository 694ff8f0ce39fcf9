"""The two ceilings of a machine: bytes per second of a copy and floating-point operations per second of a matrix
product. Measured on this machine, or stated for GPUs people plan for."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Ceiling:
    """What a machine can do at best; `measured` says whether it was timed here or stated from elsewhere."""

    machine: str
    bytes_per_s: float
    flop_per_s: dict[str, float]  # by dtype name
    measured: bool

    def time_s(self, flop: float, bytes_moved: float, dtype: torch.dtype) -> float:
        """The roofline: no call can take less."""
        rate = self.flop_per_s.get(str(dtype).removeprefix("torch."), max(self.flop_per_s.values()))
        return max(flop / rate, bytes_moved / self.bytes_per_s)

    def bound(self, flop: float, bytes_moved: float, dtype: torch.dtype) -> str:
        """What that time is spent on."""
        moving = bytes_moved / self.bytes_per_s
        return "bytes" if moving >= self.time_s(flop, bytes_moved, dtype) else "arithmetic"


# Copy bandwidth and dense 16-bit matrix rate that these GPUs reach in practice, not the data sheet's peaks.
STATED = {
    "h200": Ceiling("NVIDIA H200", 4.3e12, {"bfloat16": 790e12, "float16": 790e12, "float32": 55e12}, False),
    "h100": Ceiling("NVIDIA H100 SXM", 3.0e12, {"bfloat16": 790e12, "float16": 790e12, "float32": 55e12}, False),
    "a100": Ceiling("NVIDIA A100 SXM 80GB", 1.7e12, {"bfloat16": 270e12, "float16": 270e12, "float32": 18e12}, False),
    "rtx4090": Ceiling("NVIDIA RTX 4090", 0.92e12, {"bfloat16": 160e12, "float16": 160e12, "float32": 70e12}, False),
}


def _median_s(call, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@lru_cache(maxsize=1)
def measure_cpu() -> Ceiling:
    """Copy 128 MiB and multiply 1,536 x 1,536 matrices with torch's threads; about half a second."""
    source = torch.ones(32 * 2**20)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), 5)
    flop_per_s = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1536, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
        seconds = _median_s(lambda a=a, b=b: torch.mm(a, b), 5)
        flop_per_s[str(dtype).removeprefix("torch.")] = 2 * 1536**3 / seconds
    flop_per_s["float16"] = flop_per_s["float32"]  # CPU kernels compute fp16 in fp32
    name = f"this CPU, {torch.get_num_threads()} threads"
    return Ceiling(name, 2 * source.numel() * 4 / copy_s, flop_per_s, True)


def ceiling(machine: str | None = None) -> Ceiling:
    """The named machine's ceiling, or with None this CPU's, measured once."""
    if machine is None or machine == "cpu":
        return measure_cpu()
    if machine not in STATED:
        raise ValueError(f"roofline: machine must be one of cpu, {', '.join(STATED)}, got {machine!r}")
    return STATED[machine]
