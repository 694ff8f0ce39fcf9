"""Rotary positions as values: `RopeSpec` (which angle each pair turns by) and position builders."""

from vkernels.rope.positions import rope_positions
from vkernels.rope.spec import RopeSpec

__all__ = ["RopeSpec", "rope_positions"]
