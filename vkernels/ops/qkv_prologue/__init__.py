from vkernels.ops.qkv_prologue.api import qkv_prologue

__all__ = ["qkv_prologue"]
