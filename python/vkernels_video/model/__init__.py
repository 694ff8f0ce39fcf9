"""The reference video-LLM."""

from typing import Any

from vkernels.check import require
from vkernels_video.model.config import DecoderConfig, EncoderConfig, TaskConfig, VideoLLMConfig
from vkernels_video.model.presets import TASK_PRESETS, preset, presets
from vkernels_video.model.tasks import TaskModel
from vkernels_video.model.videollm import IMPLS, Answer, Generated, Impl, VideoLLM

__all__ = [
    "IMPLS",
    "Answer",
    "DecoderConfig",
    "EncoderConfig",
    "Generated",
    "Impl",
    "TaskConfig",
    "TaskModel",
    "VideoLLM",
    "VideoLLMConfig",
    "from_preset",
    "preset",
    "presets",
]


def from_preset(name: str, seed: int = 0, *, mesh: Any = None) -> VideoLLM | TaskModel:
    """Any of `presets()` with seeded random weights; `mesh` as `VideoLLM` takes it."""
    if name not in TASK_PRESETS:
        return VideoLLM.from_preset(name, seed, mesh=mesh)
    require(mesh is None, "from_preset", "mesh", "be None for a TaskModel", mesh)
    return TaskModel.from_preset(name, seed)
