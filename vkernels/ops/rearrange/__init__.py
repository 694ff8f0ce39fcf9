from vkernels.ops.rearrange.api import rearrange

__all__ = ["rearrange"]
