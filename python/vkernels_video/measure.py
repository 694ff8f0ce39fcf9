"""Clocks for the demo: time and memory of every stage, the sides taking turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from vkernels.bench.memory import MemoryProbe
from vkernels_video.model.videollm import Generated, Stage


class Stopwatch:
    """Wall time of every stage of one run, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass
class Measured:
    """What the runs of one side gave."""

    generated: Generated
    peak: dict[str, int]
    runs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def median(self, stage: str) -> float:
        return statistics.median(self.runs[stage])

    def spread(self, stage: str) -> float:
        """Half the range over the median."""
        runs = self.runs[stage]
        return (max(runs) - min(runs)) / 2 / self.median(stage)


def alternate(
    sides: dict[str, Callable[[Stage], Generated]],
    *,
    repeats: int,
    deadline: float,
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Measured]:
    """Run every side once under the memory probe (that run also warms it up), then `repeats` times under the clock.

    The sides take turns, so that a busy moment of the machine hits all of them. No further round starts when it would
    end after `deadline` (a time.perf_counter() value); one round is always run.
    """
    results: dict[str, Measured] = {}
    for name, run in sides.items():
        tick(f"{name}: first run, memory")
        probe = MemoryProbe()
        generated = run(probe)
        results[name] = Measured(generated, probe.peak)
    order: Sequence[str] = list(sides)
    for turn in range(repeats):
        start = time.perf_counter()
        for name in order if turn % 2 == 0 else reversed(order):
            tick(f"{name}: timed run {turn + 1}")
            watch = Stopwatch()
            sides[name](watch)
            for stage, seconds in watch.seconds.items():
                results[name].runs[stage].append(seconds)
        now = time.perf_counter()
        if now + (now - start) > deadline:
            break
    return results


def largest_difference(a: Generated, b: Generated, rows: int | None = None) -> float:
    """Largest logit difference over the tokens (or the first `rows`) both sides produced from the same beginning."""
    same = 0
    while same < len(a.tokens) and a.tokens[same] == b.tokens[same]:
        same += 1
    rows = min(same + 1, len(a.tokens), rows or len(a.tokens))
    return float((a.logits[:rows].float() - b.logits[:rows].float()).abs().max()) if rows else 0.0


def threads() -> int:
    return torch.get_num_threads()
