"""python -m vkernels bench growth: time and memory against tokens, 8 to 1,024 frames of 128 tokens, ours and a rival.

The law: no op grows worse than its algorithm. Attention may take time in proportion to the pairs a mask leaves visible,
everything else in proportion to the tokens; memory in proportion to the tokens, attention's too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vkernels import KVCache, RopeSpec, VideoMask
from vkernels import rearrangement as plans
from vkernels.bench.check import memory_left
from vkernels.bench.clock import WallTimer, loops_for
from vkernels.bench.contest import Contest, ours, theirs
from vkernels.bench.machine import environment
from vkernels.bench.memory import peak_mb
from vkernels.bench.problem import Call, name_of
from vkernels.bench.results import Point, Run, load, store
from vkernels.bench.rivals import reason
from vkernels.masks import Grid
from vkernels.spec import OPS, Maker

HEIGHT, WIDTH = 8, 16  # of a frame: 128 tokens
FRAMES = tuple(2**i for i in range(3, 11))  # 1,024 to 131,072 tokens
TOLERANCE = 1.1  # of an exponent against the work, or of memory against the tokens
LONGEST = 4  # lengths that a fit looks at: shorter ones are a launch, or lie in a cache
D = 64  # of a head
OURS = "vkernels"
SAMPLES_S = 0.2  # of timing at every length, or two samples
LARGEST_SHARE = 0.3  # of what a curve has left that one call may take
LEAST_S = 3.0  # what a curve has at the least
MEMORY_SHARE = 0.5  # of the free memory that one call may take


@dataclass(frozen=True)
class Curve:
    """A call at every number of frames: its arguments, and what its algorithm must do (pairs, or tokens)."""

    op: str
    id: str
    rival: str
    make: Callable[[Grid, Maker], dict[str, Any]]
    work: Callable[[Grid], float]
    dtype: torch.dtype = torch.float32

    def at(self, frames: int) -> Contest:
        grid = Grid(frames, HEIGHT, WIDTH)
        return Contest(self.op, self.id, self.dtype, partial(self.make, grid), self.rival, _frame_causal_rule)


def _frame_causal_rule(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k // (HEIGHT * WIDTH) <= q // (HEIGHT * WIDTH)


def _tokens(grid: Grid) -> float:
    return float(grid.tokens)


def _heads(mask: Callable[[Grid], VideoMask | None], n: int) -> Callable[[Grid, Maker], dict[str, Any]]:
    def make(grid: Grid, maker: Maker) -> dict[str, Any]:
        q, k, v = (maker.randn(1, grid.tokens, n, D) for _ in "qkv")
        return {"q": q, "k": k, "v": v, "mask": mask(grid)}

    return make


def _window_pairs(grid: Grid, extent: tuple[int, int, int]) -> float:
    """Pairs no further apart than `extent` on any axis: a product over the axes."""
    sizes = zip((grid.t, grid.h, grid.w), extent, strict=True)
    return float(math.prod(sum(min(i + e, n - 1) - max(i - e, 0) + 1 for i in range(n)) for n, e in sizes))


def _divided(axis: str) -> Callable[[Grid, Maker], dict[str, Any]]:
    def make(grid: Grid, maker: Maker) -> dict[str, Any]:
        q, k, v = (maker.randn(1, grid.tokens, 2, D) for _ in "qkv")
        return {"q": q, "k": k, "v": v, "grid": grid, "axis": axis}

    return make


def _rope(grid: Grid, maker: Maker) -> dict[str, Any]:
    q, k = maker.randn(1, grid.tokens, 12, 64), maker.randn(1, grid.tokens, 4, 64)
    return {"q": q, "k": k, "spec": RopeSpec.build(64), "pos": torch.arange(grid.tokens)}


def _prologue(grid: Grid, maker: Maker) -> dict[str, Any]:
    norms = {"q_norm": maker.randn(64), "k_norm": maker.randn(64)}
    qkv = maker.randn(1, grid.tokens, (8 + 2 * 4) * 64)
    return {"qkv": qkv, "n": 8, "m": 4, "spec": RopeSpec.build(64), "pos": torch.arange(grid.tokens), **norms}


def _pool(grid: Grid, maker: Maker) -> dict[str, Any]:
    return {"x": maker.randn(1, grid.tokens, 1024), "plan": plans.pool(grid.t, grid.h, grid.w, mode="bilinear")}


def _keep_norm(grid: Grid, maker: Maker) -> dict[str, Any]:
    plan = plans.keep(indices=torch.arange(0, grid.tokens, 2), n=grid.tokens)
    return {"x": maker.randn(1, grid.tokens, 1024), "plan": plan, "norm": "layer",
            "norm_weight": maker.randn(1024), "norm_bias": maker.randn(1024)}  # fmt: skip


def _cache(grid: Grid, maker: Maker, held: int) -> KVCache:
    cache = KVCache("int4", b=1, m=4, d=64, capacity=grid.tokens, dtype=maker.dtype)
    cache.advance(held)
    return cache


def _append(grid: Grid, maker: Maker) -> dict[str, Any]:
    k, v = (maker.randn(1, grid.tokens, 4, 64) for _ in "kv")
    return {"cache": _cache(grid, maker, 0), "k": k, "v": v}


def _decode(grid: Grid, maker: Maker) -> dict[str, Any]:
    return {"q": maker.randn(1, 1, 4, 64), "cache": _cache(grid, maker, grid.tokens)}


def _lower(grid: Grid, maker: Maker) -> dict[str, Any]:
    return {"mask": lambda: VideoMask.frame_causal(grid), "device": "cpu"}


def _half(grid: Grid) -> VideoMask:
    """Every other token dropped from frames that see themselves."""
    return VideoMask.spatial(grid).keep(torch.arange(grid.tokens) % 2 == 0, queries=True)


MASKED = "SDPA flash, dense mask"
EXTENT = (1, 2, 2)
L = HEIGHT * WIDTH
CURVES = (
    Curve("attention", "frames apart", "permute + SDPA flash + permute", _heads(VideoMask.spatial, 2),
          lambda g: g.t * L**2),
    Curve("attention", "frames apart, half of the tokens kept", MASKED, _heads(_half, 2), lambda g: g.t * (L / 2) ** 2),
    Curve("attention", "this frame and the one before", MASKED,
          _heads(lambda g: VideoMask.frame_causal(g, window=2), 2), lambda g: (2 * g.t - 1) * L**2),
    Curve("attention", "exact window of 3 x 5 x 5", MASKED, _heads(lambda g: VideoMask.window(g, EXTENT), 1),
          lambda g: _window_pairs(g, EXTENT)),
    Curve("attention", "frame-causal", MASKED, _heads(VideoMask.frame_causal, 1), lambda g: g.t * (g.t + 1) / 2 * L**2),
    Curve("attention", "joint", "SDPA flash", _heads(lambda g: None, 1), lambda g: g.tokens**2),
    Curve("divided_attention", "temporal", "permute + SDPA flash + permute back", _divided("temporal"),
          lambda g: g.t**2 * L),
    Curve("divided_attention", "spatial", "split + SDPA flash + merge", _divided("spatial"), lambda g: g.t * L**2),
    Curve("apply_rope", "12 + 4 heads of 64", "Hugging Face eager", _rope, _tokens),
    Curve("qkv_prologue", "norm and rotation, 8 + 4 + 4 heads of 64", "Hugging Face eager", _prologue, _tokens),
    Curve("rearrange", "pool 2 x 2, 1,024 channels", "definition, eager", _pool, _tokens),
    Curve("rearrange", "keep half + LayerNorm, 1,024 channels", "permute or index_select, norm", _keep_norm, _tokens),
    Curve("kv_append", "int4, 4 heads of 64", "plain PyTorch quantiser", _append, _tokens, torch.bfloat16),
    Curve("decode_attention", "int4, 4 heads of 64", "SDPA flash, cache at full width", _decode, _tokens,
          torch.bfloat16),
    Curve("lower_mask", "frame-causal", "create_block_mask", _lower, _tokens),
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """values ~ at^exponent, +- half of a 95 % confidence interval."""

    exponent: float
    half: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} \u00b1 {self.half:.2f}"

    @property
    def surely(self) -> float:
        """What the exponent is at the least."""
        return self.exponent - self.half


# Student's t for 95 %, by degrees of freedom; a normal's beyond.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45}


def fit(at: Sequence[float], values: Sequence[float]) -> Fit | None:
    """Least squares on logarithms; None under three places."""
    if len(at) < 3 or len(set(at)) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(a) for a in at], [math.log(v) for v in values]
    slope, offset = statistics.linear_regression(x, y)
    left = sum((b - slope * a - offset) ** 2 for a, b in zip(x, y, strict=True))
    mean = statistics.fmean(x)
    error = math.sqrt(left / (len(x) - 2) / sum((a - mean) ** 2 for a in x))
    return Fit(slope, STUDENT.get(len(x) - 2, 1.96) * error)


def _next(values: Sequence[float]) -> float:
    """What twice the length will take if it goes on as before: at most four times as much."""
    if len(values) < 2:
        return 4 * values[-1] if values else 0.0
    return values[-1] * min(max(values[-1] / values[-2], 2.0), 4.0)


def _timed_ms(call: Call, seconds: float) -> float:
    """The least of samples that take `seconds` in all: a growth is that of the call, not of what else runs here."""
    timer = WallTimer()
    end = time.perf_counter() + seconds
    loops = loops_for(timer, call)
    least = timer.sample(call, loops)
    while time.perf_counter() < end:
        least = min(least, timer.sample(call, loops))
    return least * 1e3


def _side(who: str, curve: Curve, frames: int, before: list[Point], seconds: float) -> Point:
    """One side at one length; `before` are its points at smaller ones, `seconds` what is left for it."""
    grid = Grid(frames, HEIGHT, WIDTH)
    point = Point(curve.op, curve.id, name_of(curve.dtype), who, grid.tokens, float(curve.work(grid)), frames)
    if before and before[-1].ms is None:
        return replace(point, why=before[-1].why)
    if (needed := _next([p.ms or 0.0 for p in before]) / 1e3) > LARGEST_SHARE * max(seconds, LEAST_S):
        return replace(point, why=f"it would take about {needed:.2g} s, more than its share of the time")
    left = memory_left("cpu") / 1e6
    if (needed := _next([p.peak_mb or 0.0 for p in before])) > MEMORY_SHARE * left:
        return replace(point, why=f"it would need about {needed / 1e3:.2g} GB, {left / 1e3:.2g} are free")
    contest = curve.at(frames)
    try:
        problem = contest.problem()
        prepare = partial(ours, problem) if who == OURS else partial(theirs, contest.opponent(), problem)
        made: list[Call] = []

        def first() -> None:
            made.append(prepare())
            made[0]()

        peak = peak_mb(first)
        return replace(point, ms=_timed_ms(made[0], SAMPLES_S), peak_mb=max(peak, 1e-3))
    except (RuntimeError, MemoryError, AssertionError) as error:
        return replace(point, why=reason(error))


def measure_curve(curve: Curve, seconds: float, frames: Sequence[int] = FRAMES) -> list[Point]:
    """Ours at every length, then the rival, as far as the time and the memory go."""
    end = time.perf_counter() + seconds
    found = []
    for who in (OURS, curve.rival):
        mine: list[Point] = []
        for count in frames:
            mine.append(_side(who, curve, count, mine, end - time.perf_counter()))
        found += mine
    return found


def _better(points: list[Point], again: list[Point]) -> list[Point]:
    """The faster of two measurements of each point, the first where one did not run."""
    pairs = zip(points, again, strict=True)
    return [b if a.ms is None or (b.ms is not None and b.ms < a.ms) else a for a, b in pairs]


def measure(
    ops: Sequence[str] = (), budget_s: float = 300.0, report: Callable[[list[Point]], None] = lambda points: None
) -> list[Point]:
    """Every curve of the ops (none named: of all) within the budget, shared evenly among the curves that are left."""
    chosen = [curve for curve in CURVES if not ops or curve.op in ops]
    end = time.perf_counter() + budget_s
    found: list[Point] = []
    for i, curve in enumerate(chosen):
        points = measure_curve(curve, (end - time.perf_counter()) / (len(chosen) - i))
        if verdict(points):  # what else runs here may have slowed the longer calls alone
            points = _better(points, measure_curve(curve, (end - time.perf_counter()) / (len(chosen) - i)))
        report(points)
        found += points
    return found


@dataclass(frozen=True)
class Grown:
    """One side of one curve, fitted."""

    op: str
    id: str
    dtype: str
    who: str
    tokens: Fit | None  # time against tokens
    work: Fit | None  # time against work
    memory: Fit | None  # peak memory against tokens
    largest: int  # tokens it was measured to
    why: str | None  # it went no further

    @property
    def name(self) -> str:
        return f"{self.op}, {self.id}"

    def faults(self) -> list[str]:
        """Where ours surely grows worse than its algorithm, or cannot be judged."""
        if self.who != OURS:
            return []
        if self.work is None or self.memory is None:
            return [f"{self.name}: measured at too few lengths to say how it grows ({self.why or 'no reason given'})"]
        found = []
        if self.work.surely > TOLERANCE:
            found.append(f"{self.name}: time grows as work^{self.work}, and must not beyond {TOLERANCE}")
        if self.memory.surely > TOLERANCE:
            found.append(f"{self.name}: memory grows as tokens^{self.memory}, and must not beyond {TOLERANCE}")
        return found


def grown(points: Sequence[Point]) -> list[Grown]:
    """Every side of every curve, in the order of the points."""
    sides: dict[tuple[str, str, str, str], list[Point]] = {}
    for point in points:
        sides.setdefault((point.op, point.id, point.dtype, point.who), []).append(point)
    return [_grown(key, sorted(of, key=lambda p: p.tokens)) for key, of in sides.items()]


def _grown(key: tuple[str, str, str, str], of: list[Point]) -> Grown:
    ran = [p for p in of if p.ms]
    long = ran[-LONGEST:]
    ms, tokens = [p.ms or 0.0 for p in long], [float(p.tokens) for p in long]
    memory = fit(tokens, [p.peak_mb or 0.0 for p in long])
    why = next((p.why for p in of if p.why), None)
    largest = max((p.tokens for p in ran), default=0)
    return Grown(*key, fit(tokens, ms), fit([p.work for p in long], ms), memory, largest, why)


def lines(points: Sequence[Point]) -> Iterator[str]:
    """A table per curve, and how its sides grow."""
    for op, id, dtype in dict.fromkeys((p.op, p.id, p.dtype) for p in points):
        of = [p for p in points if (p.op, p.id, p.dtype) == (op, id, dtype)]
        whos = list(dict.fromkeys(p.who for p in of))
        yield f"{op}, {id} [{dtype}]"
        yield f"  {'frames':>6} {'tokens':>8}  " + "  ".join(f"{who:>28}" for who in whos)
        for tokens in sorted({p.tokens for p in of}):
            at = {p.who: p for p in of if p.tokens == tokens}
            cells = (f"{_cell(at.get(who)):>28}" for who in whos)
            yield f"  {next(iter(at.values())).frames or '':>6} {tokens:>8,}  " + "  ".join(cells)
        for side in grown(of):
            if side.tokens is not None:
                fits = f"time ~ tokens^({side.tokens}) ~ work^({side.work}), memory ~ tokens^({side.memory})"
                yield f"  {side.who}: {fits}"
            if side.why:
                yield f"  {side.who} beyond {side.largest:,} tokens: {side.why}"


def _cell(point: Point | None) -> str:
    if point is None or point.ms is None:
        return "-"
    return f"{point.ms:,.3g} ms {point.peak_mb or 0:,.3g} MB"


def verdict(points: Sequence[Point]) -> list[str]:
    """What breaks the law, a sentence each."""
    return [fault for side in grown(points) for fault in side.faults()]


def main(argv: Sequence[str] | None = None) -> int:
    """0: the law holds; 1: it does not; 2: the file is no run."""
    parser = argparse.ArgumentParser(prog="python -m vkernels bench growth", description=__doc__)
    parser.add_argument("--op", nargs="*", default=[], choices=[*OPS, "lower_mask"])
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="store the points as a run of their own")
    parser.add_argument("--into", type=Path, help="put the points into this run, in the place of those it has")
    parser.add_argument("--of", type=Path, help="judge a stored run and measure nothing")
    arguments = parser.parse_args(argv)
    try:
        run = load(arguments.of or arguments.into) if arguments.of or arguments.into else None
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.of and run is not None:
        points = run.growth
        print("\n".join(lines(points)))
    else:
        points = measure(arguments.op, arguments.budget, lambda found: print("\n".join(lines(found)), flush=True))
    if arguments.out:
        print(f"stored in {store(Run(environment(), growth=points), arguments.out)}")
    if arguments.into and run is not None:
        print(f"stored in {store(replace(run, growth=points), arguments.into)}")
    faults = verdict(points) if points else ["growth: nothing was measured"]
    sides = sum(side.who == OURS for side in grown(points))
    print("\n".join(faults) or f"{sides} curves: none grows worse than its algorithm (exponents up to {TOLERANCE})")
    return 1 if faults else 0
