"""A reference video-LLM on vkernels, beside the same model in plain PyTorch."""

from vkernels_video.model import TaskModel, VideoLLM, VideoLLMConfig, from_preset, presets
from vkernels_video.video import Clip, ClipError, default_clip, load_clip, preprocess

__all__ = [
    "Clip",
    "ClipError",
    "TaskModel",
    "VideoLLM",
    "VideoLLMConfig",
    "default_clip",
    "from_preset",
    "load_clip",
    "preprocess",
    "presets",
]
