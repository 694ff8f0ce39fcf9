"""flash-attn 2.8 by name and argument, on these kernels: `from vkernels.compat import flash_attn`.

Every argument is honoured or refused in a sentence: dropout, softcap and ALiBi have no kernel here. Differences: the
CPU and float32 run too; a query that sees no key has lse -inf (flash-attn: +inf), its output is 0 in both.
"""

from vkernels.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from vkernels.compat.flash_attn.kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
