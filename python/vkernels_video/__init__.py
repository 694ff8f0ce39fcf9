"""A reference video-LLM on vkernels, beside the same model in plain PyTorch."""

from vkernels_video.model import VideoLLM, VideoLLMConfig, presets
from vkernels_video.video import Clip, ClipError, default_clip, load_clip, preprocess

__all__ = ["Clip", "ClipError", "VideoLLM", "VideoLLMConfig", "default_clip", "load_clip", "preprocess", "presets"]
