"""What the papers train with: BT-Adapter's contrast and alignment."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def gathered(x: Tensor) -> Tensor:
    """The rows of every rank, in order; x itself where nothing is distributed. Only this rank's carry a gradient, once
    per rank, so that the mean over the ranks, which DDP makes, is the gradient of one process with all rows. (The
    published code counts it once: the more ranks, the less its contrasts weigh beside the alignment.)"""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x.detach() + (x - x.detach()) * len(parts)
    return torch.cat(parts)


def contrast(video: Tensor, text: Tensor, scale: float = 100.0) -> Tensor:
    """InfoNCE in both directions, summed, not averaged, over the pairs of all ranks.

    video, text: one row per pair [b c]; they are normalised here. Source: BT-Adapter, arXiv:2309.15785.
    """
    if video.shape != text.shape or video.dim() != 2:
        raise ValueError(f"contrast: text must have the shape of video {tuple(video.shape)}, got {tuple(text.shape)}")
    v, t = (F.normalize(gathered(x), dim=-1, eps=1e-8) for x in (video, text))
    logits = scale * v @ t.T
    target = torch.arange(len(v), device=v.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def cosine_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """mean(2 - 2 cos): 0 where the directions agree. The teacher receives no gradient."""
    return 2 - 2 * F.cosine_similarity(student, teacher.detach(), dim=-1).mean()
