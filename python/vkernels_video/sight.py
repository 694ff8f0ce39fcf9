"""Teaching an encoder to see before anything is asked: which digit is in every place of a picture.

What CLIP's training is to the papers' models, in miniature. The classifier on top is thrown away; the encoder is frozen
from then on, as the papers freeze theirs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vkernels_video.digits import pictures
from vkernels_video.model import VideoLLM
from vkernels_video.model.bt_adapter import BTAdapter
from vkernels_video.model.encoder import Encoder
from vkernels_video.model.videollm import Impl

CLASSES = 11  # ten digits, and nothing
RATE = 2e-3
NOTHING = 0.2  # weight of an empty place: there are many


def patches(model: VideoLLM, pixels: Tensor, impl: Impl) -> Tensor:
    """Pictures [n 3 h w] -> the encoder's tokens of their patches [n l c]."""
    encoder = model.encoder
    if isinstance(encoder, Encoder):  # of clips: unrelated pictures side by side
        clips = pixels.unflatten(0, (-1, math.gcd(len(pixels), encoder.config.frames)))
        return encoder(clips, impl).flatten(0, 1)[:, 1:]
    return encoder.taps(pixels[:, None], encoder.depth - 1, encoder.depth, impl)[-1][:, 0, 1:]


def learn(
    model: VideoLLM, steps: int, seed: int, impl: Impl = "vkernels", size: int = 128, rate: float = 2e-3
) -> float:
    """Train and freeze the encoder; the share of held-out digits it then recognises."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(model.config.encoder.width, CLASSES)
    with torch.no_grad():
        head.weight.normal_(0, 0.02, generator=generator)
        head.bias.zero_()
    weight = torch.tensor([1.0] * 10 + [NOTHING])
    optimiser = torch.optim.AdamW([*model.encoder.parameters(), *head.parameters()], lr=RATE, weight_decay=0.05)
    for step in range(steps):
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = RATE * share * min(1.0, (step + 1) / 30)
        pixels, labels = pictures(seed * 1_000_003 + step, size)
        logits = head(patches(model, pixels, impl))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    freeze(model)
    pixels, labels = pictures(seed, 512, "test")
    with torch.inference_mode():
        seen = head(patches(model, pixels, impl)).argmax(-1)
    return float((seen == labels)[labels < 10].float().mean())


def freeze(model: VideoLLM) -> None:
    """What `learn` taught stays as it is; BT-Adapter's branch, a copy of the trunk's last blocks, learns on."""
    if isinstance(model.encoder, BTAdapter):
        model.encoder.copy_trunk_to_branch()
        model.encoder.freeze_trunk()
    else:
        model.encoder.requires_grad_(False)
