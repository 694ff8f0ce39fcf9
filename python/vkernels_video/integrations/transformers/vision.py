"""What a vision tower derives from the sizes of its clips, computed ahead: the only part of it that waits for a device
or breaks a graph."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vkernels.check import refusal, require
from vkernels_video.integrations.transformers import host


def _utilities(name: str) -> Any:
    return host.attribute("transformers.vision_utils", name)


def tower_of(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a model (or it itself) that takes grid_thw and runs packed attention."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and "get_vision_attention_seqlens" in code.co_names:
            return module
    rule = "hold a vision tower that takes grid_thw (Qwen2-VL and later, VideoLLaMA3)"
    raise ValueError(refusal("vision_kwargs", "model", rule, type(model).__name__))


def vision_kwargs(model: torch.nn.Module, grid_thw: Tensor, merge_sizes: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments that spare a packed vision tower its index building, once per clip size.

    With them, and `apply`, the tower of Qwen2.5-VL compiles with fullgraph=True: no value is read back inside.

    Args:
        model:       the tower, or a model that holds one
        grid_thw:    frames, rows and columns of patches of every clip (clips 3), int64
        merge_sizes: of every clip (clips), where the tower takes them (VideoLLaMA3)
    Returns:
        cu_seqlens, max_seqlen, position_ids, and where the tower has windows window_index, cu_window_seqlens and
        max_window_seqlen, where it interpolates a position table interp_indices and interp_weights
    Raises:
        ValueError: no such tower; MissingSeam: transformers has no such helpers
    Example:
        >>> kwargs = vkt.vision_kwargs(model, video_grid_thw)
        >>> torch.compile(model.model.visual, fullgraph=True)(pixels, video_grid_thw, **kwargs)
    """
    tower = tower_of(model)
    good = isinstance(grid_thw, Tensor) and grid_thw.dim() == 2 and grid_thw.shape[1] == 3
    shape = tuple(grid_thw.shape) if isinstance(grid_thw, Tensor) else type(grid_thw).__name__
    require(good, "vision_kwargs", "grid_thw", "have shape (clips 3)", shape)
    names = inspect.unwrap(type(tower).forward).__code__.co_names
    merge: Any = merge_sizes
    if "merge_sizes" not in host.parameters(inspect.unwrap(type(tower).forward)):
        merge = getattr(tower, "spatial_merge_size", None) or tower.config.spatial_merge_size  # type: ignore[union-attr]
    require(merge is not None, "vision_kwargs", "merge_sizes", f"be given for {type(tower).__name__}", None)
    cu_seqlens = _utilities("get_vision_cu_seqlens")(grid_thw)
    made = dict(
        cu_seqlens=cu_seqlens,
        max_seqlen=_longest(cu_seqlens),
        position_ids=_utilities("get_vision_position_ids")(grid_thw, merge),
    )
    if "get_vision_window_index" in names:
        index, cu = _utilities("get_vision_window_index")(
            grid_thw, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        made |= dict(window_index=index, cu_window_seqlens=cu, max_window_seqlen=_longest(cu))
    if "get_vision_interpolation_indices_and_weights" in names:
        indices, weights = _utilities("get_vision_interpolation_indices_and_weights")(
            grid_thw,
            tower.num_grid_per_side,
            mode=getattr(tower, "interpolation_mode", "bilinear"),
            align_corners=getattr(tower, "interpolation_align_corners", True),
            spatial_merge_size=merge,
        )
        made |= dict(interp_indices=indices, interp_weights=weights)
    return made


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max())
