"""Questions about films of digits, answered by the weights that ship with the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vkernels_video.digits import QUESTIONS, Studio
from vkernels_video.model import VideoLLM
from vkernels_video.model.videollm import END, Impl

TOKENS = 2  # a digit and the end


@dataclass(frozen=True)
class Answered:
    question: str
    answer: str
    truth: str


def shipped(name: str = "digits") -> Path:
    """The folder of weights that come with the package, for `VideoLLM.from_pretrained`; how they were made stands in
    its recipe.json."""
    folder = Path(str(resources.files("vkernels_video"))) / "weights" / name
    if not folder.is_dir():
        raise ValueError(f"shipped: name must be digits, got {name!r}")
    return folder


def ask(model: VideoLLM, seed: int, impl: Impl = "vkernels") -> list[Answered]:
    """One question of every kind, each about a film of its own whose digits the model has not seen, in free greedy
    decoding."""
    studio = Studio(seed, "test")
    asked = []
    for kind in QUESTIONS:
        film = studio.film(kind)
        tokens = model.generate(film.frames, film.question, TOKENS, impl).tokens
        said = tokens[: tokens.index(END)] if END in tokens else tokens
        asked.append(Answered(film.question, bytes(t for t in said if t < 256).decode("utf-8", "replace"), film.answer))
    return asked
