"""python -m vkernels bench gate: a short set of ratios, each held to the least its lead may be (benchmarks/gate.json).

A band is half of the lead that was measured, and never below 1: enough room for a busy machine, not for a kernel that
lost its trick. Bands belong to an instruction set; where there are none nothing is judged, and that is said.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vkernels
from vkernels import KVCache, RopeSpec, VideoMask
from vkernels import rearrangement as plans
from vkernels.bench.check import TOLERANCE, relative_error
from vkernels.bench.clock import WallTimer, loops_for, spread
from vkernels.bench.contest import Contest, ours, theirs
from vkernels.bench.machine import commit, processor
from vkernels.library import native, native_missing
from vkernels.masks import Grid
from vkernels.spec import Maker

BANDS = Path(vkernels.__file__).resolve().parent.parent / "benchmarks" / "gate.json"
MARGIN = 0.5  # of the lead above 1 that was measured
SECONDS = 1.5  # of alternating pairs for one row, or PAIRS of them
PAIRS = 7
TRIES = 3
RUNS = 3  # measurements that a band is made of
HOW = "least = 1 + 0.5 (lowest - 1), never below 1; lowest is the smallest lead of the runs"
UPDATE = "python -m vkernels bench gate --update"

BF16, FP32 = torch.bfloat16, torch.float32


def _heads(grid: Grid, n: int, d: int, maker: Maker, b: int = 1, cls: int = 0) -> dict[str, Any]:
    return {name: maker.randn(b, cls + grid.tokens, n, d) for name in "qkv"}


def _frame_causal(maker: Maker) -> dict[str, Any]:
    grid = Grid(8, 16, 16)
    return {**_heads(grid, 4, 64, maker), "mask": VideoMask.frame_causal(grid)}


def _keep(maker: Maker) -> dict[str, Any]:
    grid = Grid(8, 16, 16)
    keep = torch.rand(grid.tokens, generator=maker.generator) < 0.5
    return {**_heads(grid, 4, 64, maker), "mask": VideoMask.joint(grid).keep(keep, queries=True)}


def _divided(axis: str, maker: Maker) -> dict[str, Any]:
    grid, cls = Grid(8, 16, 16), int(axis == "spatial")
    return {**_heads(grid, 16, 64, maker, b=2, cls=cls), "grid": grid, "axis": axis, "cls": cls}


def _rope(maker: Maker) -> dict[str, Any]:
    q, k = (maker.randn(1, 4096, 32, 128) for _ in "qk")
    return {"q": q, "k": k, "spec": RopeSpec.build(128), "pos": torch.arange(4096)}


def _prologue(maker: Maker) -> dict[str, Any]:
    norms = {"q_norm": maker.randn(128), "k_norm": maker.randn(128)}
    qkv = maker.randn(1, 2048, 48 * 128)
    return {"qkv": qkv, "n": 32, "m": 8, "spec": RopeSpec.build(128), "pos": torch.arange(2048), **norms}


def _pool(maker: Maker) -> dict[str, Any]:
    plan = plans.pool(16, 27, 27, mode="bilinear").compose(plans.newline(16, 14, 14))
    return {"x": maker.randn(1, 16 * 729, 1024), "plan": plan, "fill": maker.randn(1, 1024)}


def _norm(maker: Maker) -> dict[str, Any]:
    plan = plans.keep(indices=torch.arange(0, 8192, 2), n=8192)
    weights = {"norm_weight": maker.randn(2048), "norm_bias": maker.randn(2048)}
    return {"x": maker.randn(1, 8192, 2048), "plan": plan, "norm": "layer", **weights}


def _decode(maker: Maker) -> dict[str, Any]:
    cache = KVCache("int4", b=1, m=16, d=128, capacity=16384, dtype=maker.dtype)
    cache.advance(16384)
    return {"q": maker.randn(1, 1, 16, 128), "cache": cache}


def _append(maker: Maker) -> dict[str, Any]:
    cache = KVCache("int4", b=1, m=16, d=128, capacity=4096, dtype=maker.dtype)
    return {"cache": cache, "k": maker.randn(1, 4096, 16, 128), "v": maker.randn(1, 4096, 16, 128)}


MASKED, EAGER = "SDPA flash, dense mask", "Hugging Face eager"
SET = tuple(
    Contest(op, id, dtype, make, rival)
    for op, id, make, rival, dtypes in (
        ("attention", "frame-causal, 8 x 256 tokens", _frame_causal, MASKED, (BF16, FP32)),
        ("attention", "half of 2,048 tokens kept", _keep, MASKED, (BF16, FP32)),
        ("divided_attention", "temporal, 2 x 8 x 256", partial(_divided, "temporal"),
         "permute + SDPA flash + permute back", (BF16, FP32)),
        ("divided_attention", "spatial, 2 x 8 x 256, a shared CLS", partial(_divided, "spatial"),
         "split + SDPA flash + merge", (BF16, FP32)),
        ("apply_rope", "q and k, 4,096 x 32 x 128", _rope, EAGER, (BF16, FP32)),
        ("qkv_prologue", "norm and rotation, 2,048 x 48 x 128", _prologue, EAGER, (BF16, FP32)),
        ("rearrange", "pool 27 x 27 with newlines, 16 frames", _pool, "definition, eager", (FP32,)),
        ("rearrange", "half of 8,192 x 2,048 + LayerNorm", _norm, "permute or index_select, norm", (FP32,)),
        ("decode_attention", "16,384 keys, 16 heads, int4", _decode, "SDPA flash, cache at full width", (BF16,)),
        ("kv_append", "4,096 tokens, 16 heads, int4", _append, "plain PyTorch quantiser", (BF16,)),
    )
    for dtype in dtypes
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """Their least time over ours, which other work on the machine disturbs least, and the spread of the pairs."""

    lead: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.lead:.2f}x (pairs {self.p20:.2f} to {self.p80:.2f})"


@dataclass(frozen=True)
class Band:
    """The least a row's ratio may be, and where that comes from."""

    least: float
    lowest: float  # lead of the runs
    median: float
    rival: str


def measure(contest: Contest, seconds: float = SECONDS) -> Ratio:
    """Raises AssertionError, in a sentence, where the two sides disagree: a wrong kernel has no speed."""
    problem, rival = contest.problem(), contest.opponent()
    sides = [ours(problem), theirs(rival, problem)]
    mine, other = (side() for side in sides)
    if rival.compare:
        error = relative_error(mine, other)
        assert error <= TOLERANCE[contest.dtype], f"{contest.name}: differs from {rival.name} by {error:.1e}"
    del mine, other
    timer = WallTimer()
    loops = [loops_for(timer, side) for side in sides]
    pairs: list[tuple[float, float]] = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(pairs) < PAIRS or time.perf_counter() < end:
        us, them = (timer.sample(side, n) for side, n in zip(sides, loops, strict=True))
        pairs.append((us, them))
    _, p20, p80 = spread([them / us for us, them in pairs])
    us, them = (min(side) for side in zip(*pairs, strict=True))
    return Ratio(them / us, p20, p80)


Measure = Callable[[Contest], Ratio]


def judge(contest: Contest, band: Band, measure: Measure = measure) -> tuple[bool, str]:
    """Whether a row keeps its lead, and the sentence. A row below its band is measured again before it fails."""
    found: list[Ratio] = []
    while len(found) < TRIES and not any(ratio.lead >= band.least for ratio in found):
        found.append(measure(contest))
    best = max(found, key=lambda ratio: ratio.lead)
    said = f"{contest.name}: {best} of {contest.rival}, the band begins at {band.least:.2f}x"
    if best.lead >= band.least:
        return True, said + (f", measured {len(found)} times" if len(found) > 1 else "")
    return False, (
        f"{said}, it was {band.median:.2f}x; measured {len(found)} times. Where that is meant: {UPDATE} --accept"
    )


def held(ratios: Sequence[Ratio], rival: str) -> Band:
    leads = sorted(ratio.lead for ratio in ratios)
    least = max(1.0, 1 + MARGIN * (leads[0] - 1))
    return Band(round(least, 2), round(leads[0], 2), round(leads[len(leads) // 2], 2), rival)


def isa() -> str:
    """The best instruction set of this processor, whatever is forced: bands are those of the machine."""
    return native().isa_usable()[-1]


def read(path: Path) -> dict[str, Any]:
    """Everything in the file of bands; {} where there is none. Raises ValueError in a sentence."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        for bands in stored["bands"].values():
            for band in bands["rows"].values():
                Band(**band)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"bench gate: {path} must hold bands as {UPDATE} writes them, got {error!r}") from None
    return stored


def update(path: Path, contests: Sequence[Contest], accept: bool, measure: Measure = measure) -> list[str]:
    """Measure and write the bands of this machine. The sentences of rows whose band would fall, which are not written
    unless `accept`."""
    stored = read(path)
    here = stored.setdefault("bands", {}).setdefault(isa(), {"rows": {}})
    lower = []
    for contest in contests:
        band = held([measure(contest) for _ in range(RUNS)], contest.rival)
        before = here["rows"].get(contest.name)
        print(
            f"{contest.name}: {band.median:.2f}x of {contest.rival}, the band begins at {band.least:.2f}x", flush=True
        )
        if before is not None and before["rival"] == contest.rival and band.least < before["least"] and not accept:
            lower.append(f"{contest.name}: its band would fall from {before['least']:.2f}x to {band.least:.2f}x")
            continue
        here["rows"][contest.name] = asdict(band)
    here |= {"commit": commit(), "machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps({"how": HOW, **stored}, indent=1) + "\n")
    return lower


def main(argv: Sequence[str] | None = None) -> int:
    """0: every row keeps its lead; 1: one does not, or would fall unasked; 2: the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m vkernels bench gate", description=__doc__)
    parser.add_argument("--bands", type=Path, default=BANDS)
    parser.add_argument("--match", default="", help="only rows whose name holds this")
    parser.add_argument("--update", action="store_true", help="measure the bands of this machine and write them")
    parser.add_argument("--accept", action="store_true", help="with --update: bands may fall")
    arguments = parser.parse_args(argv)
    if (missing := native_missing()) is not None:
        print(f"bench gate: {missing}", file=sys.stderr)
        return 2
    contests = [contest for contest in SET if arguments.match in contest.name]
    if not contests:
        print(f"bench gate: --match must be in the name of a row, got {arguments.match!r}", file=sys.stderr)
        return 2
    try:
        if arguments.update:
            lower = update(arguments.bands, contests, arguments.accept)
            print("\n".join([*lower, *(["not written; --accept does"] if lower else [])]))
            return 1 if lower else 0
        bands = read(arguments.bands).get("bands", {}).get(isa(), {}).get("rows", {})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not bands:
        print(f"bench gate: {arguments.bands} has no bands for {isa()}, so nothing is judged; {UPDATE} writes them")
        return 0
    return run(contests, {name: Band(**band) for name, band in bands.items()})


def run(contests: Sequence[Contest], bands: dict[str, Band], measure: Measure = measure) -> int:
    start, failed = time.perf_counter(), []
    for contest in contests:
        if contest.name not in bands:
            failed.append(f"{contest.name}: has no band; {UPDATE} writes it")
            continue
        try:
            good, said = judge(contest, bands[contest.name], measure)
        except AssertionError as error:
            good, said = False, f"{error}: not timed"
        print(f"{'ok    ' if good else 'FAILED'} {said}", flush=True)
        if not good:
            failed.append(said)
    took = time.perf_counter() - start
    print(f"{len(contests)} rows in {took:.0f} s, {len(failed)} lost their lead" + "".join(f"\n  {x}" for x in failed))
    return 1 if failed else 0
