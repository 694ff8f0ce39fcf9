"""ST-LLM: global-local input for long films."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from vkernels_video.claims import page, statistics
from vkernels_video.claims.experiment import DIGITS, Claim, Record, examine, table, train
from vkernels_video.model import VideoLLM
from vkernels_video.train import Recipe, Run

SHOT, LOCAL, PAIRS = 64, 16, 5
KINDS = ("moves", "when", "flash")
RECIPE = Recipe(steps=400, size=16, kinds=KINDS, warm_up=100)
ARMS = {
    "16 of the 64 frames": (DIGITS, LOCAL),
    "64 frames, global-local": (replace(DIGITS, arrange="global_local", local_frames=LOCAL), SHOT),
}
FEW, BOTH = ARMS
WHOLE = "64 frames, all tokens"


def _recipe(frames: int, seed: int) -> Recipe:
    return replace(RECIPE, frames=frames, every=SHOT // frames, seed=seed)


def run(seed: int) -> Record:
    arms = {}
    for arm, (config, frames) in ARMS.items():
        recipe = _recipe(frames, seed)
        arms[arm] = examine(train(config, recipe, arm), recipe)
    return {"arms": arms, "seconds": _times(seed), "threads": torch.get_num_threads()}


def _times(seed: int) -> dict[str, list[float]]:
    """Training steps, taking turns."""
    runs = {
        arm: Run(_recipe(frames, seed), VideoLLM(config).init_weights(seed))
        for arm, (config, frames) in {**ARMS, WHOLE: (DIGITS, SHOT)}.items()
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    for turn in range(PAIRS + 1):
        for arm, one in runs.items():
            started = time.perf_counter()
            one.advance()
            if turn:
                seconds[arm].append(time.perf_counter() - started)
    return seconds


def tell(records: list[Record]) -> list[str]:
    gain = statistics.difference(table(records, BOTH), table(records, FEW))
    seconds = {arm: [s for one in records for s in one["seconds"][arm]] for arm in (*ARMS, WHOLE)}
    cost, dearer = statistics.ratio(seconds[BOTH], seconds[FEW]), statistics.ratio(seconds[WHOLE], seconds[BOTH])
    return [
        f"Films of {SHOT} frames, {RECIPE.steps} steps of {RECIPE.size} films. Both arms give the decoder "
        f"{LOCAL} frames' tokens; global-local adds the mean of all {SHOT} to each.",
        "",
        *page.shares(records, ARMS, KINDS),
        "",
        f"- Global-local keeps accuracy (margin 3 points): {page.points(gain)}: **{statistics.as_much(gain, 0.03)}**.",
        f"- It does so at the cost of {LOCAL} frames (at most 1.1x): a step takes {page.ratio(cost)} the time of one "
        f"of {LOCAL} frames: **{statistics.at_most(cost, 1.1)}**. The decoder sees {LOCAL} frames' tokens, the encoder "
        f"all {SHOT} frames.",
        f"- It is cheaper than all {SHOT} frames' tokens, a step of which takes {page.ratio(dearer)} its time: "
        f"**{statistics.at_least(dearer, 1.0)}** ({len(seconds[BOTH])} alternating rounds, {records[0]['threads']} "
        "thread(s)).",
    ]


CLAIM = Claim(
    "global_local",
    "Global-local input for long films (ST-LLM)",
    "With the mean of all frames added to a few of them, a long film keeps its accuracy at the cost of the few.",
    4,
    run,
    tell,
)
