"""A reference video-LLM on vkernels, beside the same model in plain PyTorch; adapters for other people's models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
MODEL = {"TaskModel", "VideoLLM", "VideoLLMConfig", "from_preset", "presets"}


def __getattr__(name: str) -> Any:
    """Names on first use: the model needs transformers, which the doctor of the integrations must do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'model' if name in MODEL else 'video'}"), name)
