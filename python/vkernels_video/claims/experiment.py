"""What the experiments share: eyes trained once per seed, arms trained alike, answers written down film by film."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vkernels_video import sight
from vkernels_video.model import VideoLLM, VideoLLMConfig, preset
from vkernels_video.model.config import EncoderConfig, TrunkConfig
from vkernels_video.train import Recipe, Run, hits

SIGHT = 300
FILMS = 384
DIGITS = preset("digits")
Record = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """`run(seed)` measures once; `tell(records)` makes lines of Markdown of all seeds' records."""

    name: str
    title: str
    says: str
    minutes: int  # of one seed, on two quiet cores
    run: Callable[[int], Record]
    tell: Callable[[list[Record]], list[str]]


@cache
def eyes(encoder: EncoderConfig | TrunkConfig, seed: int) -> dict[str, Tensor]:
    """The weights of an encoder that has learned to see."""
    config = replace(DIGITS, encoder=encoder, arrange="interleave" if isinstance(encoder, EncoderConfig) else "all")
    model = VideoLLM(config).init_weights(seed)
    said = sight.learn(model, SIGHT, seed)
    print(f"  eyes: {said:.1%} of held-out digits recognised", file=sys.stderr, flush=True)
    return model.encoder.state_dict()


def train(
    config: VideoLLMConfig, recipe: Recipe, name: str, begin: Callable[[VideoLLM], None] = lambda model: None
) -> VideoLLM:
    """An arm: a model of this config, trained by this recipe on frozen eyes; `begin` sets what else it begins with."""
    model = VideoLLM(config).init_weights(recipe.seed)
    model.encoder.load_state_dict(eyes(config.encoder, recipe.seed), strict=config.branch is None)
    begin(model)
    run = Run(recipe, model)
    for step in range(recipe.steps):
        run.advance()
        if (step + 1) % 100 == 0:
            recent = sum(run.losses[-50:]) / 50
            print(f"  {name}: step {step + 1} of {recipe.steps}, loss {recent:.3f}", file=sys.stderr, flush=True)
    return model.eval()


def record(right: dict[str, list[bool]]) -> dict[str, str]:
    """Answers by kind, film by film: "1" right, "0" wrong."""
    return {kind: "".join("01"[hit] for hit in some) for kind, some in right.items()}


def examine(model: VideoLLM, recipe: Recipe, films: int = FILMS) -> dict[str, str]:
    return record(hits(model, films, 1, recipe.frames, kinds=sorted(set(recipe.kinds)), every=recipe.every))


def table(records: Sequence[Record], arm: str, kinds: Sequence[str] | None = None) -> np.ndarray:
    """Right answers [seeds films] of an arm, of some kinds or of all."""
    rows = []
    for one in records:
        found = one["arms"][arm]
        rows.append([int(c) for kind in sorted(found) if kinds is None or kind in kinds for c in found[kind]])
    return np.array(rows)


@torch.inference_mode()
def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
