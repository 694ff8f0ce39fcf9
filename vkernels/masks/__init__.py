"""Masks: who may see whom, as a value (VideoMask) and as kernels eat it (MaskPlan)."""

from vkernels.masks.grid import Grid
from vkernels.masks.lower import lower_mask
from vkernels.masks.plan import Box, MaskPlan
from vkernels.masks.video_mask import Text, Video, VideoMask

__all__ = ["Box", "Grid", "MaskPlan", "Text", "Video", "VideoMask", "lower_mask"]
