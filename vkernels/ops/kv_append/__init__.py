from vkernels.ops.kv_append.api import kv_append

__all__ = ["kv_append"]
