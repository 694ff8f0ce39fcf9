"""How a ratio is measured: correctness first, then ours and a rival in turn, over and over, and the median of the
pairs' ratios. docs/benchmarking.md says why."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vkernels.bench.case import Bench, Built, Entry, Opponent
from vkernels.bench.check import TOLERANCE, relative_error
from vkernels.bench.clock import LEAST, Timer, loops_for, replayed, spread, timer_for
from vkernels.bench.memory import peak_mb
from vkernels.bench.problem import Call, name_of
from vkernels.bench.results import Row
from vkernels.bench.rivals import Rival, reason
from vkernels.roofline import Ceiling

__all__ = ["TOLERANCE", "Bench", "Lane", "Settings", "relative_error", "rounds_of"]

MOST = 60  # rounds of one ratio
SLOW_S, FEWEST = 2.0, 3  # a pair that takes longer than this is run so often, its warm-up included


class Meter:
    """The seconds per call that samples measured, added up. As pytest-benchmark's timer it makes its statistics those
    of a call, on the GPU's own clock where there is one."""

    def __init__(self) -> None:
        self.total = 0.0

    def read(self) -> float:
        return self.total


METER = Meter()


@dataclass
class Settings:
    """How rows are measured."""

    ceiling: Ceiling
    device: str = "cpu"
    seconds: float = 1.0  # measuring time of one ratio
    cold: bool = False
    memory: bool = True
    until: float = float("inf")  # time.monotonic() after which nothing more is begun
    timer: Timer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = timer_for(self.device)


Pedantic = Callable[..., Any]  # pytest-benchmark's: (target, setup=, rounds=)


def rounds_of(target: Call, setup: Call, rounds: int) -> None:
    """What `benchmark.pedantic` does, without its statistics."""
    for _ in range(rounds):
        setup()
        target()


def duel(
    ours: Call, theirs: Call, settings: Settings, pedantic: Pedantic = rounds_of
) -> tuple[list[float], list[float]]:
    """Seconds per call of both sides, in turn: a round is a sample of theirs, then one of ours."""
    timer, cold = settings.timer, settings.cold
    if settings.device.startswith("cuda"):
        ours, theirs = replayed(ours), replayed(theirs)
    loops = [1 if cold else loops_for(timer, call) for call in (theirs, ours)]
    times: tuple[list[float], list[float]] = ([], [])

    def rival_sample() -> None:
        times[1].append(timer.sample(theirs, loops[0], cold))

    def our_sample() -> None:
        times[0].append(timer.sample(ours, loops[1], cold))
        METER.total += times[0][-1]

    gc.disable()
    try:
        start = time.perf_counter()
        rounds_of(our_sample, rival_sample, 1)
        pair = max(time.perf_counter() - start, 1e-6)
        slow = pair > SLOW_S
        if not slow:
            for side in times:
                side.clear()  # that was the warm-up; slow calls were made before, and count from here
        rounds = max(FEWEST if slow else LEAST, min(MOST, int(settings.seconds / pair)))
        pedantic(our_sample, setup=rival_sample, rounds=rounds - slow)
    finally:
        gc.enable()
    return times


@dataclass
class Lane:
    """An entry and one of its rivals: what becomes a row."""

    entry: Entry
    rival: Rival

    def row(self, **found: Any) -> Row:
        entry = self.entry
        return Row(
            id=entry.id, op=entry.op, dtype=name_of(entry.dtype), rival=self.rival.name, model=entry.model,
            frames=entry.frames, direction=entry.direction, target=entry.target(self.rival.name),
            flop=entry.cost.flop, bytes=entry.cost.bytes, **found,
        )  # fmt: skip

    def measure(self, built: Built, settings: Settings, pedantic: Pedantic = rounds_of) -> Row | None:
        """None where the rival does not speak of such a call. Raises AssertionError where ours is wrong."""
        common = {"backend": built.backend, "error": built.error, "cache": "cold" if settings.cold else "warm"}
        try:
            opponent = built.opponent(self.rival.name)
        except AssertionError:
            raise
        except Exception as error:
            return self.row(why=reason(error), **common)
        return None if opponent is None else self._timed(built, opponent, settings, pedantic, common)

    def _timed(
        self, built: Built, opponent: Opponent, settings: Settings, pedantic: Pedantic, common: dict[str, Any]
    ) -> Row:
        ours_s, rival_s = duel(built.ours, opponent.call, settings, pedantic)
        cost, ceiling = self.entry.cost, settings.ceiling
        ours, rival = spread(ours_s), spread(rival_s)
        ratio = spread([r / o for o, r in zip(ours_s, rival_s, strict=True)])
        if settings.memory:
            common |= {
                "peak_mb": peak_mb(built.ours, settings.device),
                "rival_peak_mb": peak_mb(opponent.call, settings.device),
            }
        return self.row(
            ours_ms=ours[0] * 1e3, ours_p20_ms=ours[1] * 1e3, ours_p80_ms=ours[2] * 1e3,
            rival_ms=rival[0] * 1e3, rival_p20_ms=rival[1] * 1e3, rival_p80_ms=rival[2] * 1e3,
            ratio=ratio[0], ratio_p20=ratio[1], ratio_p80=ratio[2],
            gb_per_s=cost.bytes / ours[0] / 1e9, tflop_per_s=cost.flop / ours[0] / 1e12,
            roofline_share=ceiling.time_s(cost.flop, cost.bytes, self.entry.dtype) / ours[0],
            rival_error=opponent.error, **common,
        )  # fmt: skip


def all_dtypes() -> dict[str, torch.dtype]:
    return {name_of(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
