"""What `vkernels_video.train` trains on films of digits, each a value.

st_llm: connector and decoder answer questions, with ST-LLM's masks and second pass on request.
branch: BT-Adapter's branch beside the frozen encoder, by its three losses, its tubes masked. A caption is a question
        with its answer; the text tower has learned to tell captions apart and is frozen.
heads:  VideoLLM's translator, reasoner and heads on the frozen encoder's features, online, a unit per frame: three
        digits appear one after the other and stay; which one is the newest?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vkernels_video import sight
from vkernels_video.digits import BOARD, IMAGE, QUESTIONS, Film, Studio, batch
from vkernels_video.model import TaskModel, VideoLLM, checkpoint, preset
from vkernels_video.model.clip import Trunk
from vkernels_video.model.config import BranchConfig, ReasonerConfig, TaskConfig, TextTowerConfig, TrunkConfig
from vkernels_video.model.masking import dynamic_rate, random_keep, tube_keep
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import states, training_losses
from vkernels_video.model.text_tower import Pretraining, TextTower
from vkernels_video.model.videollm import BEGIN, END, Impl

Hits = dict[str, list[bool]]  # of test films, by kind


@dataclass(frozen=True)
class Recipe:
    """How a run goes. `mask`: tokens are dropped at ST-LLM's dynamic rate; `mvm`: with its second pass and loss."""

    what: str = "st_llm"
    preset: str = "digits"  # the model, or that whose encoder is watched
    steps: int = 4000
    size: int = 32  # films per step, of all ranks together
    rate: float = 2e-3
    warm_up: int = 200
    decay: float = 0.05
    frames: int = 8
    every: int = 1  # frames shot for each that is shown
    kinds: tuple[str, ...] = ("moves", "first", "first", "first", "count", "count", "when")  # the slow ones more often
    sight: int = 600  # steps of the encoder alone; 0: none, and an ST-LLM's learns with the rest
    mask: bool = False
    mvm: bool = False
    tubes: float = 0.7  # share of the patches that the branch does not see, in no frame
    seed: int = 0
    impl: Impl = "vkernels"

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(self.steps - self.warm_up, 1)))


@dataclass(frozen=True)
class Part:
    """A rank's share of a step. Everything is drawn for the whole step, so that ranks together do what one would."""

    rank: int = 0
    world: int = 1

    def of(self, whole: Any) -> Any:
        """This rank's of as many films, or rows, as all ranks have."""
        each = len(whole) // self.world
        return whole[self.rank * each : (self.rank + 1) * each]


@dataclass(frozen=True)
class Job:
    """What is trained: `train.Run` is the loop around it."""

    recipe: Recipe  # unless told otherwise
    build: Callable[[Recipe], tuple[nn.Module, float | None]]  # the model, and what its encoder recognises
    load: Callable[[Recipe, Path], nn.Module]  # what `Run.save` wrote
    losses: Callable[[Any, Recipe, Studio, torch.Generator, Part], dict[str, Tensor]]  # of one step; "total" is learned
    hits: Callable[[Any, Recipe, int, int], Hits]  # of so many test films from a seed


def seen(recipe: Recipe) -> tuple[VideoLLM, float | None]:
    """A preset whose encoder has learned to see."""
    model = VideoLLM(preset(recipe.preset)).init_weights(recipe.seed)
    return model, sight.learn(model, recipe.sight, recipe.seed, recipe.impl) if recipe.sight else None


def loaded(blank: Callable[[Recipe], nn.Module]) -> Callable[[Recipe, Path], nn.Module]:
    def load(recipe: Recipe, folder: Path) -> nn.Module:
        model = blank(recipe)
        checkpoint.load(model, checkpoint.read(folder), "trainer's")
        return model

    return load


def shoot(studio: Studio, size: int, part: Part) -> tuple[Tensor, list[Film]]:
    """This rank's films of so many, and their pixels [b t 3 h w]."""
    films = part.of([studio.film() for _ in range(size)])
    return torch.stack([film.frames for film in films]), films


def trunk_of(recipe: Recipe) -> TrunkConfig:
    config = preset(recipe.preset).encoder
    if not isinstance(config, TrunkConfig):
        raise ValueError(f"train: preset must have a per-frame encoder for {recipe.what}, got {recipe.preset}")
    return config


# --- ST-LLM


def example(film: Film) -> Example:
    return Example([BEGIN], list(film.question.encode()), [*film.answer.encode(), END])


def st_llm_losses(
    model: VideoLLM, recipe: Recipe, studio: Studio, generator: torch.Generator, part: Part
) -> dict[str, Tensor]:
    pixels, films = shoot(studio, recipe.size, part)
    rows = model.visual(model.features(pixels, recipe.impl), recipe.impl).flatten(1, 2)
    keep = None
    if recipe.mask:
        keep = part.of(random_keep(recipe.size, rows.shape[1], dynamic_rate(generator), generator))
    mvm = model.mvm if recipe.mvm else None
    return training_losses(model.decoder, mvm, [example(film) for film in films], rows, keep, recipe.impl)


@torch.inference_mode()
def answers(model: VideoLLM, films: Sequence[Film], impl: Impl = "vkernels") -> list[str]:
    """The digit the model finds likeliest after each question, films of equal length side by side."""
    pixels = torch.stack([film.frames for film in films])
    rows = model.visual(model.features(pixels, impl), impl).flatten(1, 2)
    examples = [Example([BEGIN], list(film.question.encode()), [0]) for film in films]
    h, laid = states(model.decoder, examples, rows, None, impl, "compacted")
    logits = model.decoder.lm_head(model.decoder.rows(h, laid.predicting, laid.lengths, impl))
    return [chr(ord("0") + int(i)) for i in logits[:, ord("0") : ord("9") + 1].argmax(-1)]


def _judged(
    answer: Callable[[list[Film]], list[str]], films: int, studio: Studio, kinds: Sequence[str]
) -> dict[str, list[bool]]:
    right: Hits = {kind: [] for kind in kinds}
    for start in range(0, films, 64):
        _, some = batch(studio, min(64, films - start))
        for film, said in zip(some, answer(some), strict=True):
            right[film.kind].append(said == film.answer)
    return right


def hits(
    model: VideoLLM,
    films: int,
    seed: int,
    frames: int = 8,
    impl: Impl = "vkernels",
    kinds: Sequence[str] = QUESTIONS,
    every: int = 1,
) -> Hits:
    """Whether each of so many test films was answered rightly, by kind of question."""
    training = model.training
    model.eval()
    studio = Studio(seed, "test", frames, kinds, every)
    right = _judged(lambda some: answers(model, some, impl), films, studio, kinds)
    model.train(training)
    return right


def kinds_of(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(recipe.kinds))


# --- BT-Adapter's branch

# The branch's gates open slowly by design (factors of 1e2); the ungated form is the published zero-shot config's.
READING, READING_RATE = 50, 2e-3  # steps of the text tower alone
BRANCH = BranchConfig(layers=2, frames=8, gated=False, drop_path=0.0, pretraining=True)


def _pretraining(recipe: Recipe) -> Pretraining:
    trunk = trunk_of(recipe)
    text = TextTowerConfig(
        width=64, heads=2, layers=2, mlp=128, vocab=END + 1, context=48, projection=trunk.projection, end=END
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Pretraining(trunk, replace(BRANCH, layers=min(BRANCH.layers, trunk.layers)), text)


def caption(film: Film) -> str:
    return f"{film.question} {film.answer}"


def teach_to_read(tower: TextTower, recipe: Recipe) -> None:
    """What CLIP's training is to its text tower, in miniature: to tell captions apart by their direction. Random
    weights do not (cosines of 0.9999: a digit drowns in the end mark)."""
    studio = Studio(recipe.seed, "train", 4, recipe.kinds)
    ids = caption_ids(sorted({caption(studio.film()) for _ in range(1000)}))
    tower.requires_grad_(True)
    optimiser = torch.optim.AdamW(tower.parameters(), lr=READING_RATE)
    for _ in range(READING):
        one = F.normalize(tower(ids, recipe.impl), dim=-1)
        loss = F.cross_entropy(10 * one @ one.T, torch.arange(len(ids)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    tower.requires_grad_(False)


def pretraining(recipe: Recipe) -> tuple[Pretraining, float | None]:
    model, (seer, recognised) = _pretraining(recipe), seen(recipe)
    model.video.load_state_dict(seer.encoder.state_dict(), strict=False)
    model.video.copy_trunk_to_branch()
    if recipe.sight:
        teach_to_read(model.text, recipe)
    return model, recognised


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Bytes and end marks [b s]."""
    rows = [torch.tensor([*caption.encode(), END]) for caption in captions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END)


def branch_losses(
    model: Pretraining, recipe: Recipe, studio: Studio, generator: torch.Generator, part: Part
) -> dict[str, Tensor]:
    pixels, films = shoot(studio, recipe.size, part)
    patches = model.video.config.patches
    keep = part.of(tube_keep(recipe.size, pixels.shape[1], patches, recipe.tubes, generator=generator))
    ids = caption_ids([caption(film) for film in films])
    return model(pixels, ids, keep, recipe.impl)


@torch.inference_mode()
def named(model: Pretraining, films: Sequence[Film], impl: Impl) -> list[str]:
    """The digit that makes of each question the caption nearest to the film, among ten."""
    x, z = model.video(torch.stack([film.frames for film in films]), impl)
    video = model.video.video_features(x, z)
    captions = caption_ids([f"{film.question} {digit}" for film in films for digit in range(10)])
    text = model.text(captions, impl).unflatten(0, (len(films), 10))
    near = torch.cosine_similarity(video[:, None], text, dim=-1)
    return [str(int(i)) for i in near.argmax(-1)]


def branch_hits(model: Pretraining, recipe: Recipe, films: int, seed: int) -> Hits:
    kinds = kinds_of(recipe)
    studio = Studio(seed, "test", recipe.frames, kinds, recipe.every)
    return _judged(lambda some: named(model, some, recipe.impl), films, studio, kinds)


# --- VideoLLM's heads

NOBODY = 10
REASONER = ReasonerConfig(width=64, heads=2, layers=2, mlp=256, vocab=16, context=64)


class Watcher(nn.Module):
    """A frozen encoder of frames and a task on its features, a unit per frame, a cell per patch.

    alone: every unit is a stream of its own, without a past
    """

    def __init__(self, encoder: TrunkConfig, alone: bool = False):
        super().__init__()
        self.encoder, self.alone = Trunk(encoder).requires_grad_(False), alone
        self.task = TaskModel(TaskConfig("online_action_detection", encoder.width, NOBODY + 1, REASONER))

    @torch.no_grad()
    def features(self, pixels: Tensor, impl: Impl = "vkernels") -> Tensor:
        """Films [b t 3 h w] -> units [b t u c]."""
        depth = self.encoder.depth
        return self.encoder.taps(pixels, depth - 1, depth, impl)[-1][:, :, 1:]

    def forward(self, units: Tensor, impl: Impl = "vkernels") -> dict[str, Tensor]:
        """Scores [b t classes], of now and of what comes next."""
        b, t = units.shape[:2]
        out = self.task(units.flatten(0, 1)[:, None] if self.alone else units, impl=impl)
        return {name: scores.reshape(b, t, -1) for name, scores in out.items()}


def watcher(recipe: Recipe) -> tuple[Watcher, float | None]:
    model, (seer, recognised) = _watcher(recipe), seen(recipe)
    model.encoder.load_state_dict(seer.encoder.state_dict())
    return model, recognised


def _watcher(recipe: Recipe) -> Watcher:
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Watcher(trunk_of(recipe))


def newest(studio: Studio) -> tuple[Tensor, Tensor]:
    """A film [t 3 h w] of three digits that appear one after the other and stay, and the newest at every frame [t]."""
    digits = studio.digits(3)
    board, labels = np.full((studio.t, IMAGE, IMAGE), -1.0, dtype=np.float32), torch.full((studio.t,), NOBODY)
    cells = studio.random.sample(range(BOARD * BOARD), 3)
    times = sorted(studio.random.sample(range(studio.t), 3))
    for digit, cell, start in zip(digits, cells, times, strict=True):
        studio.place(board, digit, studio._stay(cell, start, studio.t))
        labels[start:] = digit
    return torch.from_numpy(board)[:, None].expand(-1, 3, -1, -1), labels


def streams(studio: Studio, count: int, part: Part = Part()) -> tuple[Tensor, Tensor]:
    """Pixels [b t 3 h w] and labels [b t] of films of `newest`."""
    pixels, labels = zip(*part.of([newest(studio) for _ in range(count)]), strict=True)
    return torch.stack(pixels), torch.stack(labels)


def heads_losses(
    model: Watcher, recipe: Recipe, studio: Studio, generator: torch.Generator, part: Part
) -> dict[str, Tensor]:
    pixels, labels = streams(studio, recipe.size, part)
    return {"total": model.task.loss(model(model.features(pixels, recipe.impl), recipe.impl), labels)}


@torch.inference_mode()
def heads_hits(model: Watcher, recipe: Recipe, films: int, seed: int) -> Hits:
    """Each film at one of its units, in turn: units of one film are alike."""
    studio, right = Studio(seed, "test", recipe.frames), []
    for start in range(0, films, 64):
        pixels, labels = streams(studio, min(64, films - start))
        said = model(model.features(pixels, recipe.impl), recipe.impl)["now"].argmax(-1)
        at = (start + torch.arange(len(labels)))[:, None] % recipe.frames
        right += (said == labels).gather(1, at)[:, 0].tolist()
    return {"newest": right}


JOBS = {
    "st_llm": Job(
        Recipe(),
        seen,
        lambda recipe, folder: VideoLLM.from_pretrained(folder),
        st_llm_losses,
        lambda model, recipe, films, seed: hits(
            model, films, seed, recipe.frames, recipe.impl, kinds_of(recipe), recipe.every
        ),
    ),
    "branch": Job(
        Recipe("branch", steps=1000, warm_up=100),
        pretraining,
        loaded(_pretraining),
        branch_losses,
        branch_hits,
    ),
    "heads": Job(
        Recipe("heads", steps=400, frames=16, warm_up=50), watcher, loaded(_watcher), heads_losses, heads_hits
    ),
}
