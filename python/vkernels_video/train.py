"""Training in miniature: a small ST-LLM on films of digits (`vkernels_video.digits`), on two cores, in minutes.

python -m vkernels_video.train --out runs/digits [--steps N] [--size N] [--impl eager|vkernels] [--mvm] [--resume]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vkernels_video.digits import KINDS, Film, Studio, batch
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
    size: int = 64  # films per step
    rate: float = 1e-3
    warm_up: int = 200
    decay: float = 0.05
    frames: int = 8
    mask: bool = True
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

    def __init__(self, recipe: Recipe, config: VideoLLMConfig | None = None):
        self.recipe, self.step = recipe, 0
        self.model = VideoLLM(config or preset(recipe.preset)).init_weights(recipe.seed).train()
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
        self.losses: list[float] = []

    def advance(self) -> dict[str, float]:
        """One step: everything random in it follows from the seed and its number."""
        recipe, model = self.recipe, self.model
        pixels, films = batch(Studio(recipe.seed * 1_000_003 + self.step, "train", recipe.frames), recipe.size)
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
        recipe = Recipe(**json.loads((folder / "recipe.json").read_text()))
        model = VideoLLM.from_pretrained(folder)
        run = cls(recipe, model.config)
        run.model.load_state_dict(model.state_dict())
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
    logits = model.decoder.lm_head(h.flatten(0, 1)[laid.predicting])
    return [chr(ord("0") + int(i)) for i in logits[:, ord("0") : ord("9") + 1].argmax(-1)]


def accuracy(
    model: VideoLLM, films: int = 512, seed: int = 1, frames: int = 8, impl: Impl = "vkernels"
) -> dict[str, float]:
    """Share of right answers on test films, per kind of question and over all ("all")."""
    training = model.training
    model.eval()
    studio = Studio(seed, "test", frames)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, films, 64):
        _, some = batch(studio, min(64, films - start))
        for film, answer in zip(some, answers(model, some, impl), strict=True):
            right[film.kind].append(answer == film.answer)
    model.train(training)
    everything = [hit for hits in right.values() for hit in hits]
    return {kind: sum(hits) / max(len(hits), 1) for kind, hits in [*right.items(), ("all", everything)]}


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
    parser.add_argument("--films", type=int, default=512, help="test films at the end")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--impl", choices=("eager", "vkernels"), default=Recipe.impl)
    parser.add_argument("--mvm", action="store_true", help="with the second pass and its loss")
    parser.add_argument("--resume", action="store_true", help="go on where the folder's checkpoint stopped")
    arguments = parser.parse_args(argv)
    if arguments.resume:
        run = Run.resume(arguments.out)
    else:
        names = ("steps", "size", "seed", "impl", "mvm")
        run = Run(Recipe(**{name: getattr(arguments, name) for name in names}))
    began = time.perf_counter()
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
    result = {
        "accuracy": accuracy(run.model, arguments.films),
        "seconds": time.perf_counter() - began,
        "steps": run.step,
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["accuracy"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
