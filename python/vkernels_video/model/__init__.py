"""The reference video-LLM."""

from vkernels_video.model.config import DecoderConfig, EncoderConfig, VideoLLMConfig
from vkernels_video.model.presets import preset, presets
from vkernels_video.model.videollm import IMPLS, Generated, Impl, VideoLLM

__all__ = [
    "IMPLS",
    "DecoderConfig",
    "EncoderConfig",
    "Generated",
    "Impl",
    "VideoLLM",
    "VideoLLMConfig",
    "preset",
    "presets",
]
