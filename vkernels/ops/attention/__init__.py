from vkernels.ops.attention.api import attention

__all__ = ["attention"]
