"""The reference video-LLM: encoder -> projector -> frames back in order -> decoder, in two implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

import vkernels as vk
from vkernels.rearrangement import assemble, interleave_clips
from vkernels_video.model.cache import DequantisingCache, dequantise
from vkernels_video.model.config import VideoLLMConfig, preset
from vkernels_video.model.decoder import Decoder, Prompt, ntk_base
from vkernels_video.model.encoder import Encoder, Projector

Impl = Literal["eager", "vkernels"]
IMPLS: tuple[Impl, ...] = ("eager", "vkernels")
BEGIN, END = 256, 257
Stage = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Generated:
    tokens: list[int]
    logits: Tensor  # one row per generated token, [tokens vocab]
    prompt: Prompt
    rotary_base: float
    cache_bytes: int  # keys and values of all layers, as stored


class VideoLLM(nn.Module):
    """A video-LLM of INTP's shape (arXiv:2409.12963).

    A short-clip encoder with space-time layers, interleaved clips for more frames than it was made for, all visual
    tokens into a LLaMA-like decoder with a scaled rotary base, and a quantised cache.

    `impl="eager"` is plain PyTorch and transformers, `impl="vkernels"` the library; the weights are the same tensors.
    """

    def __init__(self, config: VideoLLMConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.projector = Projector(config.encoder, config.decoder)
        self.decoder = Decoder(config.decoder)
        self.dequantise = dequantise

    @classmethod
    def from_preset(cls, name: str, seed: int = 0) -> VideoLLM:
        """A preset with seeded random weights."""
        return cls(preset(name)).init_weights(seed)

    def init_weights(self, seed: int) -> VideoLLM:
        """Random weights, the same for the same seed: linear maps keep the size of their input, so that attention is
        neither uniform nor one-hot and every layer matters to the result."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("embedding"):
                    parameter.normal_(0, 0.5, generator=generator)
                elif parameter.dim() >= 2:
                    fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                    parameter.normal_(0, gain * fan_in**-0.5, generator=generator)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.02, generator=generator)
        return self

    def compiled_copy(self) -> VideoLLM:
        """The same weights with the plain side under torch.compile: every layer, the projector, and the dequantisation
        (the cache itself keeps Python lists of what it stores, which breaks the graph there as it does for users)."""
        copy = VideoLLM(self.config)
        copy.load_state_dict(self.state_dict(), assign=True)
        for module in (*copy.encoder.layers, copy.projector, *copy.decoder.layers):
            module.compile()
        copy.dequantise = torch.compile(dequantise, dynamic=True)
        return copy.eval()

    def encode(self, pixels: Tensor, impl: Impl = "vkernels") -> Tensor:
        """Frames [f 3 h w] -> features of interleaved clips [m t l c].

        f frames make m = ceil(f / t) clips; clip j takes frames j, j + m, j + 2 m, ... and so spans the whole video.
        The last frame is repeated to fill the last slots; `connect` drops the copies.
        """
        capacity = self.config.encoder.frames
        if len(pixels) <= capacity:
            return self.encoder(pixels[None], impl)
        clips = math.ceil(len(pixels) / capacity)
        missing = clips * capacity - len(pixels)
        if missing:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        return self.encoder(pixels.unflatten(0, (capacity, clips)).transpose(0, 1), impl)

    def connect(
        self, features: Tensor, frames: int, before: list[int], after: list[int], impl: Impl = "vkernels"
    ) -> tuple[Tensor, Prompt]:
        """Features [m t l c] and text -> decoder inputs [1 s d], text, frames in the order of time, text."""
        x = self.projector(features)
        text = self.decoder.embed_tokens(torch.tensor([before + after], dtype=torch.int64))
        prompt = Prompt(len(before), frames, x.shape[2], len(after))
        if impl == "eager":
            visual = rearrange(x, "m t l d -> (t m) l d")[:frames].flatten(0, 1)
            return torch.cat([text[:, : len(before)], visual[None], text[:, len(before) :]], dim=1), prompt
        restore = interleave_clips(*x.shape[:3], frames=frames)
        parts = [("text", prompt.before), ("video", frames * prompt.tokens), ("text", prompt.after)]
        inputs = vk.rearrange([text, x.flatten(0, 2)[None]], assemble(parts, video=restore))
        assert isinstance(inputs, Tensor)
        return inputs, prompt

    def new_caches(self, impl: Impl, length: int) -> list:
        """An empty cache per layer with room for `length` tokens."""
        config = self.config
        layers, group, residual = range(config.decoder.layers), config.kv_group, config.kv_residual
        if impl == "eager":
            return [DequantisingCache(config.kv, group, residual, self.dequantise) for _ in layers]
        m, d, dtype = config.decoder.kv_heads, config.decoder.head, self.decoder.lm_head.weight.dtype
        return [
            vk.KVCache(config.kv, b=1, m=m, d=d, capacity=length, group=group, residual=residual, dtype=dtype)
            for _ in layers
        ]

    @torch.inference_mode()
    def generate(
        self,
        pixels: Tensor,
        question: str,
        tokens: int,
        impl: Impl = "vkernels",
        stage: Stage = lambda name: nullcontext(),
    ) -> Generated:
        """Greedy decoding of `tokens` tokens about frames [f 3 h w]. `stage(name)` wraps each stage, for clocks."""
        text = list(question.encode())
        with stage("encoder"):
            features = self.encode(pixels, impl)
        with stage("connector"):
            x, prompt = self.connect(features, len(pixels), [BEGIN], text, impl)
        del features
        base = ntk_base(self.config.decoder, prompt.length + tokens)
        with stage("prefill"):
            caches = self.new_caches(impl, prompt.length + tokens)
            logits = [self.decoder(x, 0, base, caches, prompt, impl)]
        del x
        with stage("decode"):
            chosen = [int(logits[0].argmax())]
            while len(chosen) < tokens:
                x = self.decoder.embed_tokens(torch.tensor([chosen[-1:]]))
                position = prompt.length + len(chosen) - 1
                logits.append(self.decoder(x, position, base, caches, None, impl))
                chosen.append(int(logits[-1].argmax()))
        return Generated(chosen, torch.cat(logits), prompt, base, sum(cache.bytes for cache in caches))
