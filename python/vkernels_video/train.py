"""Training in miniature, on films of digits (`vkernels_video.digits`), on two cores, in minutes.

python -m vkernels_video.train --out runs/digits [--what st_llm|branch|heads] [--steps N] [--size N] [--resume] ...

What is trained stands in `vkernels_video.jobs`. First the encoder learns to see (`vkernels_video.sight`) and is frozen.
Under torchrun the ranks share the films of every step: the result is that of one process, whatever their number.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vkernels as vk
from vkernels.check import require
from vkernels_video import sight
from vkernels_video.digits import Studio
from vkernels_video.jobs import JOBS, Hits, Part, Recipe, answers, example, hits
from vkernels_video.model import IMPLS, VideoLLM
from vkernels_video.model.videollm import Impl

__all__ = ["Recipe", "Run", "accuracy", "answers", "example", "hits", "plot", "ship", "wilson"]


class Step(nn.Module):
    """The losses of a step as a module, which DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, recipe: Recipe, part: Part):
        super().__init__()
        self.model, self.recipe, self.part = model, recipe, part

    def forward(self, step: int) -> dict[str, Tensor]:
        recipe, seed = self.recipe, self.recipe.seed * 1_000_003 + step
        studio = Studio(seed, "train", recipe.frames, recipe.kinds, recipe.every)
        generator = torch.Generator().manual_seed(seed)
        return JOBS[recipe.what].losses(self.model, recipe, studio, generator, self.part)


class Run:
    """A model under training: steps, checkpoints from which a run goes on bit by bit, and what was measured.

    Where torch.distributed has been initialised the ranks share each step; rank 0 writes.
    """

    def __init__(self, recipe: Recipe, model: nn.Module | None = None):
        """A model that is given has its sight already."""
        require(recipe.what in JOBS, "train", "what", f"be one of {', '.join(JOBS)}", repr(recipe.what))
        self.recipe, self.step = recipe, 0
        self.recognised: float | None = None  # held-out digits the encoder knew when it was frozen
        if model is None:
            model, self.recognised = JOBS[recipe.what].build(recipe)
        elif recipe.sight and isinstance(model, VideoLLM):
            sight.freeze(model)
        self.model: Any = model.train()
        shared = dist.is_available() and dist.is_initialized()
        self.part = Part(dist.get_rank(), dist.get_world_size()) if shared else Part()
        rule = f"be a multiple of the {self.part.world} ranks"
        require(recipe.size % self.part.world == 0, "train", "size", rule, recipe.size)
        self.losses_of: nn.Module = Step(model, recipe, self.part)
        if shared:
            self.losses_of = DistributedDataParallel(self.losses_of, find_unused_parameters=True)
        learning = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in learning if p.dim() >= 2]
        others = [p for p in learning if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
        self.losses: list[float] = []

    def advance(self) -> dict[str, float]:
        """One step: everything random in it follows from the seed and its number."""
        with torch.random.fork_rng():  # what a model drops by itself
            torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * self.part.world + self.part.rank)
            losses = self.losses_of(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        values = torch.stack([loss.detach() for loss in losses.values()])
        if self.part.world > 1:
            dist.all_reduce(values)
        found = dict(zip(losses, (values / self.part.world).tolist(), strict=True))
        self.losses.append(found["total"])
        return found

    def save(self, folder: Path) -> None:
        """Everything a later `resume` needs."""
        if self.part.rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, VideoLLM):
            self.model.save_pretrained(folder)
        else:
            save_torch_state_dict(dict(self.model.state_dict()), folder)
        state = {"optimiser": self.optimiser.state_dict(), "step": self.step, "losses": self.losses}
        torch.save(state, folder / "trainer.pt")
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")

    @classmethod
    def resume(cls, folder: Path) -> Run:
        """The run that `save` left in a folder."""
        if not (folder / "recipe.json").is_file():
            raise ValueError(f"train: {folder} must hold a saved run, got none")
        saved = json.loads((folder / "recipe.json").read_text())
        recipe = Recipe(**{**saved, "kinds": tuple(saved["kinds"])})
        run = cls(recipe, JOBS[recipe.what].load(recipe, folder))
        state = torch.load(folder / "trainer.pt", weights_only=True)
        run.optimiser.load_state_dict(state["optimiser"])
        run.step, run.losses = state["step"], state["losses"]
        return run


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
    """Right answers of an ST-LLM on test films, per kind of question and over all ("all")."""
    return shares(hits(model, films, seed, frames, impl))


def shares(right: Hits) -> dict[str, dict[str, float]]:
    """Per kind and over all ("all"): share, 95 % interval, films."""
    right = right | {"all": [hit for some in right.values() for hit in some]}
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


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vkernels_video.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint, curve and results")
    parser.add_argument("--what", choices=tuple(JOBS), default="st_llm", help="what is trained (default: st_llm)")
    parser.add_argument("--steps", type=int, help="default: 4000, 1000 for the branch, 400 for the heads")
    parser.add_argument("--size", type=int, help="films per step, of all ranks together (default: 32)")
    parser.add_argument("--sight", type=int, help="steps of the encoder before the films (default: 600)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--impl", choices=IMPLS)
    parser.add_argument("--films", type=int, default=1024, help="test films at the end")
    parser.add_argument("--mask", action="store_true", default=None, help="drop video tokens at ST-LLM's dynamic rate")
    parser.add_argument("--mvm", action="store_true", default=None, help="with ST-LLM's second pass and its loss")
    parser.add_argument("--tubes", type=float, help="share of the patches the branch does not see (default: 0.7)")
    parser.add_argument("--ship", type=Path, help="also write an ST-LLM in half precision, with its story, here")
    parser.add_argument(
        "--threads", type=int, default=1, help="a second helps only where nothing else runs (default: 1)"
    )
    parser.add_argument("--resume", action="store_true", help="go on where the folder's checkpoint stopped")
    arguments = parser.parse_args(argv)
    if arguments.ship and arguments.what != "st_llm":
        parser.error(f"--ship takes st_llm, got {arguments.what}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return train(arguments)
    dist.init_process_group("gloo")
    try:
        return train(arguments)
    finally:
        dist.destroy_process_group()


def train(arguments: argparse.Namespace) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    if arguments.resume:
        run = Run.resume(arguments.out)
    else:
        recipe = JOBS[arguments.what].recipe
        names = ("steps", "size", "seed", "impl", "mask", "mvm", "tubes", "sight")
        said = {name: getattr(arguments, name) for name in names}
        run = Run(replace(recipe, **{name: value for name, value in said.items() if value is not None}))
    columns = ("step {task.completed:.0f}/{task.total:.0f}", "loss {task.fields[loss]:.3f}")
    shown = (TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), TimeRemainingColumn())
    with Progress(*shown, disable=run.part.rank > 0) as progress:
        task = progress.add_task("train", total=run.recipe.steps, completed=run.step, loss=float("nan"))
        while run.step < run.recipe.steps:
            losses = run.advance()
            progress.update(task, completed=run.step, loss=losses["total"])
            if run.step % 500 == 0:
                run.save(arguments.out)
    run.save(arguments.out)
    if run.part.rank == 0:
        report(run, arguments, time.perf_counter() - began)
    return 0


def report(run: Run, arguments: argparse.Namespace, seconds: float) -> None:
    """The curve, and what the model knows of test films."""
    plot(run.losses, arguments.out / "loss.png")
    run.model.eval()
    found = shares(JOBS[run.recipe.what].hits(run.model, run.recipe, arguments.films, 1))
    result = {"accuracy": found, "recognised": run.recognised, "seconds": seconds, "steps": run.step}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    if arguments.ship:
        ship(run, arguments.ship, result)
    for kind, of in found.items():
        print(f"{kind:6} {of['share']:6.1%}  ({of['low']:.1%} to {of['high']:.1%} on {of['films']} films)")


if __name__ == "__main__":
    raise SystemExit(main())
