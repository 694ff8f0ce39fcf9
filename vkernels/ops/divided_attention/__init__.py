from vkernels.ops.divided_attention.api import divided_attention

__all__ = ["divided_attention"]
