"""What the ranks do with the reference model. Every function runs on each of them with the same arguments."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

import vkernels as vk
from vkernels import distributed as vd
from vkernels_video.model import VideoLLM, preset
from vkernels_video.model.masking import random_keep
from vkernels_video.model.mesh import Place, Ranks, remember
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import training_losses

EXAMPLES = [Example([256], [104, 105, 63], [110, 111, 257]), Example([256, 9], [7], [50])]


@cache
def group(world: int) -> dist.ProcessGroup:
    """The first so many ranks; the others have no part in it."""
    return dist.new_group(list(range(world)))


def config(name: str, **changes):
    """A preset; nothing in it is random."""
    found = preset(name).with_options(**{"context": 512, **changes})
    return found if found.branch is None else replace(found, branch=replace(found.branch, drop_path=0.0))


def models(world: int, name: str, **changes) -> tuple[VideoLLM, VideoLLM] | None:
    """One for this process, one on the first `world` ranks; None on the others."""
    mesh, made = group(world), config(name, **changes)
    if dist.get_rank() >= world:
        return None
    return VideoLLM(made).init_weights(0), VideoLLM(made, mesh=mesh).init_weights(0)


def film(model: VideoLLM, frames: int, b: int | None = None) -> Tensor:
    side, random = model.config.encoder.image, torch.Generator().manual_seed(frames)
    return torch.randn((b or 1, frames, 3, side, side), generator=random)[0 if b is None else slice(None)]


def training(model: VideoLLM, frames: int, masked: bool, positions: str = "original") -> dict[str, Tensor]:
    """A training step of ST-LLM on two films."""
    text = torch.arange(12).view(2, 6) if model.reads else None
    rows = model.visual(model.features(film(model, frames, 2)), text=text).flatten(1, 2)
    keep = random_keep(2, rows.shape[1], 0.4, torch.Generator().manual_seed(1)) if masked else None
    return training_losses(model.decoder, model.mvm, EXAMPLES, rows, keep, positions=positions)


def trained(world: int, name: str, frames: int, masked: bool) -> float:
    """Largest difference of losses, and of gradients averaged over the ranks, from one process."""
    pair = models(world, name)
    if pair is None:
        return 0.0
    one, mine = pair
    want, got = (training(model, frames, masked) for model in pair)
    assert want.keys() == got.keys()
    for losses in (want, got):
        losses["total"].backward()
    worst = max(abs(float((want[key] - got[key]).detach())) for key in want)
    for (key, a), b in zip(one.named_parameters(), mine.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None and b.grad is not None:
            dist.all_reduce(b.grad, group=group(world))
            worst = max(worst, float((a.grad - b.grad / world).abs().max() / a.grad.abs().max().clamp_min(1e-3)))
    return worst
