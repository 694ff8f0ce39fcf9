from vkernels.ops.apply_rope.api import apply_rope

__all__ = ["apply_rope"]
