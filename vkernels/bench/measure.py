"""How a ratio is measured: correctness first, then ours and each rival in turn, over and over, and the median of the
pairwise ratios. docs/benchmarking.md says why."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vkernels.bench.results import Row
from vkernels.spec import Cost

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of the largest magnitude
MIN_SAMPLE_S = 2e-3  # one sample repeats a call until it lasts this long


@dataclass(frozen=True)
class Bench:
    """One row to be: a call of ours, what a user would otherwise write, and what either must do at the least."""

    id: str  # what is computed, as a reader would say it
    op: str
    dtype: torch.dtype
    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any]]
    cost: Cost
    targets: dict[str, float] = field(default_factory=dict)  # rival -> ratio to reach
    model: str = ""  # whose shape this is
    tolerance: float = 2e-2  # largest |ours - rival| relative to the largest |rival|
    compare: bool = True  # False only where the two outputs mean different things (mask objects)


def _tensors(result: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_flatten

    return [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]


def relative_error(ours: Any, rival: Any) -> float:
    """Largest difference over the outputs, relative to each output's largest magnitude."""
    worst = 0.0
    a, b = _tensors(ours), _tensors(rival)
    assert len(a) == len(b), f"{len(a)} outputs against {len(b)}"
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape, f"shape {tuple(x.shape)} against {tuple(y.shape)}"
        x, y = x.detach().double(), y.detach().double()
        scale = y.abs().max().item() if y.numel() else 1.0
        error = ((x - y).abs().max().item() if y.numel() else 0.0) / max(scale, 1e-12)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _sample_s(call: Callable[[], Any], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def _loops(call: Callable[[], Any]) -> int:
    call()
    once = _sample_s(call, 1)
    return max(1, min(1000, round(MIN_SAMPLE_S / max(once, 1e-7))))


def measure(bench: Bench, ceiling: Any, seconds: float = 4.0) -> list[Row]:
    """Rows against every rival. Raises AssertionError where the outputs disagree: a wrong kernel has no speed."""
    rows = []
    for name, rival in bench.rivals.items():
        error = None
        if bench.compare:
            error = relative_error(bench.ours(), rival())
            assert error <= bench.tolerance, f"{bench.id}: differs from {name} by {error:.2e}"
        loops, rival_loops = _loops(bench.ours), _loops(rival)
        ours_s: list[float] = []
        rival_s: list[float] = []
        gc.collect()
        gc.disable()
        end = time.perf_counter() + seconds
        try:
            while len(ours_s) < 5 or (time.perf_counter() < end and len(ours_s) < 60):
                ours_s.append(_sample_s(bench.ours, loops))
                rival_s.append(_sample_s(rival, rival_loops))
        finally:
            gc.enable()
        ratios = sorted(r / o for o, r in zip(ours_s, rival_s, strict=True))
        ours = statistics.median(ours_s)
        rows.append(
            Row(
                id=bench.id,
                op=bench.op,
                model=bench.model,
                dtype=str(bench.dtype).removeprefix("torch."),
                rival=name,
                ours_ms=ours * 1e3,
                rival_ms=statistics.median(rival_s) * 1e3,
                ratio=statistics.median(ratios),
                ratio_p20=ratios[len(ratios) // 5],
                ratio_p80=ratios[(4 * len(ratios)) // 5],
                target=bench.targets.get(name),
                flop=bench.cost.flop,
                bytes=bench.cost.bytes,
                gb_per_s=bench.cost.bytes / ours / 1e9,
                tflop_per_s=bench.cost.flop / ours / 1e12,
                roofline_share=ceiling.time_s(bench.cost.flop, bench.cost.bytes, bench.dtype) / ours,
                error=error,
            )
        )
    return rows
