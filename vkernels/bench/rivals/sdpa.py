"""PyTorch's fused attention, one kernel at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
GPU_ONLY = ("cuDNN", "efficient")


def heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str | None, **options: Any) -> torch.Tensor:
    """Attention on (b n s d) by the kernel named so, or with None by PyTorch's own choice."""
    if q.shape[1] != k.shape[1]:
        if kernel == "efficient":  # it knows no grouped heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        else:
            options["enable_gqa"] = True
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel([KERNELS[kernel]]):
        return F.scaled_dot_product_attention(q, k, v, **options)


def tokens_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str | None, **options: Any) -> torch.Tensor:
    """The same on (b s n d), by views."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return heads_first(q, k, v, kernel, **options).transpose(1, 2)
