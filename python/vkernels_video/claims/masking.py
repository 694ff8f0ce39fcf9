"""ST-LLM: what dynamic masking saves in a training step."""

from __future__ import annotations

import time

import torch

from vkernels_video.claims import page, statistics
from vkernels_video.claims.experiment import DIGITS, Claim, Record
from vkernels_video.measure import MemoryProbe
from vkernels_video.model import VideoLLM
from vkernels_video.model.masking import dynamic_rate
from vkernels_video.train import Recipe, Run

PAIRS = 12
FRAMES = (8, 16)


def run(seed: int) -> Record:
    """Time and peak memory of a step with and without masking, taking turns; both see the same films."""
    measured = {}
    for frames in FRAMES:
        runs: dict[str, Run] = {}
        seconds: dict[str, list[float]] = {}
        peak: dict[str, int] = {}
        for name in ("full", "masked"):
            recipe = Recipe(frames=frames, mask=name == "masked", seed=seed)
            runs[name] = Run(recipe, VideoLLM(DIGITS).init_weights(seed))
            probe = MemoryProbe()
            with probe(name):
                runs[name].advance()
            peak[name], seconds[name] = probe.peak[name], []
        for pair in range(PAIRS):
            for name in ("full", "masked") if pair % 2 else ("masked", "full"):
                started = time.perf_counter()
                runs[name].advance()
                seconds[name].append(time.perf_counter() - started)
        measured[str(frames)] = {"seconds": seconds, "peak": peak}
    generator = torch.Generator().manual_seed(seed)
    rates = [dynamic_rate(generator) for _ in range(1000)]
    return {"measured": measured, "threads": torch.get_num_threads(), "dropped": sum(rates) / len(rates)}


def tell(records: list[Record]) -> list[str]:
    lines = [
        f"Whole training steps of 32 films (frozen encoder, decoder forward and backward, optimiser), "
        f"{PAIRS} alternating pairs per seed, {records[0]['threads']} thread(s); on average "
        f"{records[0]['dropped']:.0%} of the video tokens are dropped. Ratios above 1 are what masking saves.",
        "",
        "| frames | step time, full / masked | peak memory, full / masked |",
        "|---|---|---|",
    ]
    verdicts = []
    for frames in FRAMES:
        of = [one["measured"][str(frames)] for one in records]
        seconds = {name: [s for one in of for s in one["seconds"][name]] for name in ("full", "masked")}
        times = statistics.ratio(seconds["full"], seconds["masked"])
        memory = statistics.ratio([one["peak"]["full"] for one in of], [one["peak"]["masked"] for one in of])
        lines.append(f"| {frames} | {page.ratio(times)} | {page.ratio(memory)} |")
        holds = times.low > 1 and memory.low > 1
        verdicts.append(
            f"- {frames} frames: a masked step is faster and smaller: **{'holds' if holds else 'does not hold'}**."
        )
    return [*lines, "", *verdicts]


CLAIM = Claim(
    "masking",
    "What masking saves in a training step (ST-LLM)",
    "Dropping tokens at a dynamic rate makes a training step cheaper in time and memory.",
    1,
    run,
    tell,
)
