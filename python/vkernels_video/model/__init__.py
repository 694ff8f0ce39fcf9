"""The reference video-LLM."""

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


def from_preset(name: str, seed: int = 0) -> VideoLLM | TaskModel:
    """Any of `presets()` with seeded random weights."""
    return TaskModel.from_preset(name, seed) if name in TASK_PRESETS else VideoLLM.from_preset(name, seed)
