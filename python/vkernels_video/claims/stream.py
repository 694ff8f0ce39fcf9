"""VideoLLM: a reasoner over a stream of units."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vkernels_video.claims import page, statistics
from vkernels_video.claims.experiment import Claim, Record, eyes, record, table
from vkernels_video.digits import Studio
from vkernels_video.jobs import JOBS, Watcher, streams, trunk_of
from vkernels_video.model.reasoner import Stream
from vkernels_video.model.tasks import TaskModel
from vkernels_video.train import Run

FILMS = 96
RECIPE = JOBS["heads"].recipe
ARMS = ("with its past", "each unit alone")
PAST, ALONE = ARMS


def run(seed: int) -> Record:
    encoder = trunk_of(RECIPE)
    seen = eyes(encoder, seed)
    pixels, labels = streams(Studio(1, "test", RECIPE.frames), FILMS)
    arms, apart = {}, 0.0
    for arm in ARMS:
        torch.manual_seed(seed)
        model = Watcher(encoder, alone=arm == ALONE)
        model.encoder.load_state_dict(seen)
        training = Run(replace(RECIPE, seed=seed), model)
        while training.step < RECIPE.steps:
            training.advance()
        with torch.inference_mode():
            features = model.features(pixels)
            right = (model(features)["now"].argmax(-1) == labels).flatten().tolist()
        arms[arm] = record({"newest": right})
        if arm == PAST:
            apart = _live(model.task, features)
    return {"arms": arms, "apart": apart}


@torch.inference_mode()
def _live(model: TaskModel, features: Tensor) -> float:
    """Largest difference between the states of a stream, unit by unit, and those of a whole recomputation."""
    whole = model.states(features)
    stream = Stream(model.reasoner, b=len(features))
    steps = [stream.step(model.translator(features[:, i : i + 1], "vkernels")) for i in range(features.shape[1])]
    return float((torch.cat(steps, dim=1) - whole).abs().max())


def tell(records: list[Record]) -> list[str]:
    # Units of one film are alike: films are what is drawn again.
    right = {arm: table(records, arm).reshape(len(records), FILMS, RECIPE.frames).mean(-1) for arm in ARMS}
    gain = statistics.difference(right[PAST], right[ALONE])
    apart = max(one["apart"] for one in records)
    return [
        f"Online detection: three digits appear one after the other and stay; the head says at each of {RECIPE.frames} "
        f"units which is the newest. {RECIPE.steps} steps of {RECIPE.size} films, {FILMS} test films.",
        "",
        "| | units answered rightly |",
        "|---|---|",
        *(f"| {arm} | {page.percent(statistics.share(right[arm]))} |" for arm in ARMS),
        "",
        f"- The head learns what only the past can tell: {page.points(gain)} over a unit alone: "
        f"**{statistics.more(gain)}**.",
        f"- Live decoding equals full recomputation: largest difference of a state {apart:.1e}: "
        f"**{'holds' if apart < 1e-4 else 'does not hold'}** (1e-4).",
    ]


CLAIM = Claim(
    "stream",
    "A reasoner over a stream of units (VideoLLM)",
    "Fed unit by unit against a cache, the reasoner says what a whole recomputation would; a linear head on it learns "
    "an online task.",
    1,
    run,
    tell,
)
