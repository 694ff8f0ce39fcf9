"""VideoLLM: a reasoner over a stream of units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vkernels_video.claims import page, statistics
from vkernels_video.claims.experiment import DIGITS, Claim, Record, eyes, record, table
from vkernels_video.digits import BOARD, IMAGE, Studio
from vkernels_video.model import VideoLLM
from vkernels_video.model.config import ReasonerConfig, TaskConfig
from vkernels_video.model.reasoner import Stream
from vkernels_video.model.tasks import TaskModel

UNITS, STEPS, SIZE, FILMS = 16, 400, 32, 96
NOBODY = 10
REASONER = ReasonerConfig(width=64, heads=2, layers=2, mlp=256, vocab=16, context=64)
TASK = TaskConfig("online_action_detection", DIGITS.encoder.width, NOBODY + 1, REASONER)
ARMS = ("with its past", "each unit alone")
PAST, ALONE = ARMS


def film(studio: Studio) -> tuple[Tensor, Tensor]:
    """Three digits appear one after the other and stay; which one is the newest at every frame."""
    digits = studio.digits(3)
    board, newest = np.full((studio.t, IMAGE, IMAGE), -1.0, dtype=np.float32), torch.full((studio.t,), NOBODY)
    cells = studio.random.sample(range(BOARD * BOARD), 3)
    times = sorted(studio.random.sample(range(studio.t), 3))
    for digit, cell, start in zip(digits, cells, times, strict=True):
        studio.place(board, digit, studio._stay(cell, start, studio.t))
        newest[start:] = digit
    return torch.from_numpy(board)[:, None].expand(-1, 3, -1, -1), newest


def films(encoder: VideoLLM, seed: int, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Units [b N u c] of frozen features, a cell per patch, and labels [b N]."""
    studio = Studio(seed, split, UNITS)
    pixels, labels = zip(*(film(studio) for _ in range(count)), strict=True)
    with torch.inference_mode():
        features = encoder.features(torch.stack(pixels))[:, :, 1:]
    return features.clone(), torch.stack(labels)


def run(seed: int) -> Record:
    encoder = VideoLLM(DIGITS)
    encoder.encoder.load_state_dict(eyes(DIGITS.encoder, seed))
    features, labels = films(encoder, 1, "test", FILMS)
    arms, apart = {}, 0.0
    for arm in ARMS:
        torch.manual_seed(seed)
        model = TaskModel(replace(TASK))
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
            x, y = films(encoder, seed * 1_000_003 + step, "train", SIZE)
            loss = F.cross_entropy(_now(model, x, arm).flatten(0, 1), y.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.inference_mode():
            right = (_now(model, features, arm).argmax(-1) == labels).flatten().tolist()
        arms[arm] = record({"newest": right})
        if arm == PAST:
            apart = _live(model, features)
    return {"arms": arms, "apart": apart}


def _now(model: TaskModel, x: Tensor, arm: str) -> Tensor:
    if arm == PAST:
        return model(x)["now"]
    return model(x.flatten(0, 1)[:, None])["now"].view(*x.shape[:2], -1)


@torch.inference_mode()
def _live(model: TaskModel, features: Tensor) -> float:
    """Largest difference between the states of a stream, unit by unit, and those of a whole recomputation."""
    whole = model.states(features)
    stream = Stream(model.reasoner, b=len(features))
    steps = [stream.step(model.translator(features[:, i : i + 1], "vkernels")) for i in range(features.shape[1])]
    return float((torch.cat(steps, dim=1) - whole).abs().max())


def tell(records: list[Record]) -> list[str]:
    # Units of one film are alike: films are what is drawn again.
    right = {arm: table(records, arm).reshape(len(records), FILMS, UNITS).mean(-1) for arm in ARMS}
    gain = statistics.difference(right[PAST], right[ALONE])
    apart = max(one["apart"] for one in records)
    return [
        f"Online detection: three digits appear one after the other and stay; the head says at each of {UNITS} units "
        f"which is the newest. {STEPS} steps of {SIZE} films, {FILMS} test films.",
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
