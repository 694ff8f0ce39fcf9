"""Training in miniature: a small ST-LLM on films of digits (`vkernels_video.digits`), on two cores, in minutes.

python -m vkernels_video.train --out runs/digits [--steps N] [--size N] [--mask] [--mvm] [--resume]

First the encoder learns to see (`vkernels_video.sight`) and is frozen, then connector and decoder learn to answer.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import vkernels as vk
from vkernels_video import sight
from vkernels_video.digits import QUESTIONS, Film, Studio, batch
from vkernels_video.model import VideoLLM, VideoLLMConfig, preset
from vkernels_video.model.masking import dynamic_rate, random_keep
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import states, training_losses
from vkernels_video.model.videollm import BEGIN, END, Impl


@dataclass(frozen=True)
class Recipe:
    """How a run goes. `mask`: tokens are dropped at ST-LLM's dynamic rate; `mvm`: with its second pass and loss."""

    preset: str = "digits"
    steps: int = 4000
    size: int = 32  # films per step
    rate: float = 2e-3
    warm_up: int = 200
    decay: float = 0.05
    frames: int = 8
    every: int = 1  # frames shot for each that is shown
    kinds: tuple[str, ...] = ("moves", "first", "first", "first", "count", "count", "when")  # the slow ones more often
    sight: int = 600  # steps of the encoder alone; 0: it learns with the rest
    mask: bool = False
    mvm: bool = False
    seed: int = 0
    impl: Impl = "vkernels"

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(self.steps - self.warm_up, 1)))


def example(film: Film) -> Example:
    return Example([BEGIN], list(film.question.encode()), [*film.answer.encode(), END])


class Run:
    """A model under training: steps, checkpoints from which a run goes on bit by bit, and what was measured."""

    def __init__(self, recipe: Recipe, model: VideoLLM | VideoLLMConfig | None = None):
        """A model that is given has its sight already."""
        self.recipe, self.step = recipe, 0
        self.recognised: float | None = None  # held-out digits the encoder knew when it was frozen
        if isinstance(model, VideoLLM):
            self.model = model.train()
            if recipe.sight:
                sight.freeze(model)
        else:
            self.model = VideoLLM(model or preset(recipe.preset)).init_weights(recipe.seed).train()
            if recipe.sight:
                self.recognised = sight.learn(self.model, recipe.sight, recipe.seed, recipe.impl)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in learning if p.dim() >= 2]
        others = [p for p in learning if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
        self.losses: list[float] = []

    def advance(self) -> dict[str, float]:
        """One step: everything random in it follows from the seed and its number."""
        recipe, model = self.recipe, self.model
        studio = Studio(recipe.seed * 1_000_003 + self.step, "train", recipe.frames, recipe.kinds, recipe.every)
        pixels, films = batch(studio, recipe.size)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        rows = model.visual(model.features(pixels, recipe.impl), recipe.impl).flatten(1, 2)
        keep = None
        if recipe.mask:
            keep = random_keep(len(films), rows.shape[1], dynamic_rate(generator), generator)
        mvm = model.mvm if recipe.mvm else None
        losses = training_losses(model.decoder, mvm, [example(film) for film in films], rows, keep, recipe.impl)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        self.losses.append(values["total"])
        return values

    def save(self, folder: Path) -> None:
        """Everything a later `resume` needs."""
        self.model.save_pretrained(folder)
        state = {"optimiser": self.optimiser.state_dict(), "step": self.step, "losses": self.losses}
        torch.save(state, folder / "trainer.pt")
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")

    @classmethod
    def resume(cls, folder: Path) -> Run:
        """The run that `save` left in a folder."""
        if not (folder / "recipe.json").is_file():
            raise ValueError(f"train: {folder} must hold a saved run, got none")
        saved = json.loads((folder / "recipe.json").read_text())
        run = cls(Recipe(**{**saved, "kinds": tuple(saved["kinds"])}), VideoLLM.from_pretrained(folder))
        state = torch.load(folder / "trainer.pt", weights_only=True)
        run.optimiser.load_state_dict(state["optimiser"])
        run.step, run.losses = state["step"], state["losses"]
        return run


@torch.inference_mode()
def answers(model: VideoLLM, films: Sequence[Film], impl: Impl = "vkernels") -> list[str]:
    """The digit the model finds likeliest after each question, films of equal length side by side."""
    pixels = torch.stack([film.frames for film in films])
    rows = model.visual(model.features(pixels, impl), impl).flatten(1, 2)
    examples = [Example([BEGIN], list(film.question.encode()), [0]) for film in films]
    h, laid = states(model.decoder, examples, rows, None, impl, "compacted")
    logits = model.decoder.lm_head(model.decoder.rows(h, laid.predicting, laid.lengths, impl))
    return [chr(ord("0") + int(i)) for i in logits[:, ord("0") : ord("9") + 1].argmax(-1)]


def hits(
    model: VideoLLM,
    films: int,
    seed: int,
    frames: int = 8,
    impl: Impl = "vkernels",
    kinds: Sequence[str] = QUESTIONS,
    every: int = 1,
) -> dict[str, list[bool]]:
    """Whether each of so many test films was answered rightly, by kind of question."""
    training = model.training
    model.eval()
    studio = Studio(seed, "test", frames, kinds, every)
    right: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for start in range(0, films, 64):
        _, some = batch(studio, min(64, films - start))
        for film, answer in zip(some, answers(model, some, impl), strict=True):
            right[film.kind].append(answer == film.answer)
    model.train(training)
    return right


def wilson(right: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    n = len(right)
    if n == 0:
        return 0.0, 1.0
    p = sum(right) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def accuracy(
    model: VideoLLM, films: int = 512, seed: int = 1, frames: int = 8, impl: Impl = "vkernels"
) -> dict[str, dict[str, float]]:
    """Right answers on test films, per kind of question and over all ("all"): share, 95 % interval, films."""
    right = hits(model, films, seed, frames, impl)
    right["all"] = [hit for some in right.values() for hit in some]
    return {
        kind: {
            "share": sum(some) / max(len(some), 1), "low": wilson(some)[0], "high": wilson(some)[1], "films": len(some)
        }
        for kind, some in right.items()
    }  # fmt: skip


def ship(run: Run, folder: Path, result: dict[str, Any]) -> None:
    """The weights in half precision, and beside them how they came about."""
    halves = VideoLLM(run.model.config).half()
    halves.load_state_dict(run.model.state_dict())
    halves.save_pretrained(folder)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "vkernels": vk.__version__}
    story = {"recipe": asdict(run.recipe), **result, "versions": versions}
    (folder / "recipe.json").write_text(json.dumps(story, indent=2) + "\n")


def plot(losses: Sequence[float], file: Path) -> None:
    """The loss curve as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(losses, linewidth=0.6, color="#9db4c8", label="step")
    width = max(len(losses) // 50, 1)
    smooth = torch.tensor(losses)[None, None].unfold(-1, width, width).mean(-1)[0, 0]
    axes.plot([width * (i + 0.5) for i in range(len(smooth))], smooth, color="#1f4e79", label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m vkernels_video.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint, curve and results")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--size", type=int, default=Recipe.size, help="films per step")
    parser.add_argument("--sight", type=int, default=Recipe.sight, help="steps of the encoder before the films")
    parser.add_argument("--films", type=int, default=1024, help="test films at the end")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--impl", choices=("eager", "vkernels"), default=Recipe.impl)
    parser.add_argument("--mask", action="store_true", help="drop video tokens at ST-LLM's dynamic rate")
    parser.add_argument("--mvm", action="store_true", help="with the second pass and its loss")
    parser.add_argument("--ship", type=Path, help="also write the weights in half precision, with their story, here")
    parser.add_argument("--resume", action="store_true", help="go on where the folder's checkpoint stopped")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    if arguments.resume:
        run = Run.resume(arguments.out)
    else:
        names = ("steps", "size", "seed", "impl", "mask", "mvm", "sight")
        run = Run(Recipe(**{name: getattr(arguments, name) for name in names}))
    columns = ("step {task.completed:.0f}/{task.total:.0f}", "loss {task.fields[loss]:.3f}")
    with Progress(TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=run.recipe.steps, completed=run.step, loss=float("nan"))
        while run.step < run.recipe.steps:
            losses = run.advance()
            progress.update(task, completed=run.step, loss=losses["total"])
            if run.step % 500 == 0:
                run.save(arguments.out)
    run.save(arguments.out)
    plot(run.losses, arguments.out / "loss.png")
    found = accuracy(run.model, arguments.films)
    result = {
        "accuracy": found,
        "recognised": run.recognised,
        "seconds": time.perf_counter() - began,
        "steps": run.step,
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    if arguments.ship:
        ship(run, arguments.ship, result)
    for kind, of in found.items():
        print(f"{kind:6} {of['share']:6.1%}  ({of['low']:.1%} to {of['high']:.1%} on {of['films']} films)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
