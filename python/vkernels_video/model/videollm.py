"""The reference video-LLM: encoder -> projector -> frames back in order -> decoder, in two implementations."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from einops import rearrange
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor, nn

import vkernels as vk
from vkernels.rearrangement import assemble, interleave_clips
from vkernels_video.model import checkpoint, connector
from vkernels_video.model.bt_adapter import BTAdapter
from vkernels_video.model.cache import FULL_PRECISION, DequantisingCache, GrowingCache, dequantise
from vkernels_video.model.clip import Trunk
from vkernels_video.model.config import EncoderConfig, VideoLLMConfig
from vkernels_video.model.decoder import Decoder, Prompt, ntk_base
from vkernels_video.model.encoder import Encoder
from vkernels_video.model.presets import preset
from vkernels_video.model.st_llm import GlobalLocal, MVMHead

log = logging.getLogger("vkernels_video")
CONFIG_FILE = "vkernels_video.json"
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
    """A video-LLM put together by its config.

    An encoder (of clips, or of frames with BT-Adapter's branch beside it or without), a connector, an arrangement of
    the frames, all of it into a LLaMA-like decoder with a scaled rotary base and a cache, quantised or not.

    `impl="eager"` is plain PyTorch and transformers, `impl="vkernels"` the library; the weights are the same tensors.
    """

    def __init__(self, config: VideoLLMConfig):
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.encoder: Encoder | Trunk | BTAdapter
        if isinstance(encoder, EncoderConfig):
            self.encoder = Encoder(encoder)
        else:
            self.encoder = Trunk(encoder) if config.branch is None else BTAdapter(encoder, config.branch)
        self.projector = connector.build(config)
        width = config.decoder.width
        self.global_local = GlobalLocal(width, width // 4) if config.arrange == "global_local" else None
        self.mvm = MVMHead(width) if config.mvm else None
        self.decoder = Decoder(config.decoder)
        self.dequantise = dequantise

    @classmethod
    def from_preset(cls, name: str, seed: int = 0) -> VideoLLM:
        """A preset with seeded random weights."""
        return cls(preset(name)).init_weights(seed)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *more: str | Path,
        config: VideoLLMConfig | str | None = None,
        allow_missing: Sequence[str] = (),
    ) -> VideoLLM:
        """A model with the weights of a folder or file: this library's own, or a layout of `checkpoint.SOURCES`.

        path, more: what published weights come in, together: BT-Adapter's three files and LLaMA's folder, say. A name
                    that is no path is fetched from the Hugging Face hub
        config:     of the model, or a preset's name; None reads the folder's own, as `save_pretrained` wrote it
        allow_missing: patterns of names that may stay as `init_weights` left them; they are logged

        Every tensor finds its place or is on its source's list of unused ones; CheckpointError names those that do not.
        """
        paths = [_local(each) for each in (path, *more)]
        if config is None:
            config = _own_config(paths[0])
        model = cls(preset(config) if isinstance(config, str) else config).init_weights(0)
        state: checkpoint.State = {}
        names = []
        for each in paths:
            found = checkpoint.read(each)
            source = checkpoint.recognise(found)
            fresh, unused = checkpoint.translate(found, source)
            log.info("%s: %d tensors of %s have no use here", each, len(unused), source.name)
            if twice := sorted(state.keys() & fresh.keys()):
                raise checkpoint.CheckpointError(
                    f"checkpoint: {each} must not give {twice[0]} a second time, got it twice"
                )
            state |= fresh
            names.append(source.name)
        left = checkpoint.load(model, state, " + ".join(names), allow_missing)
        if left:
            log.warning("from_pretrained: %d tensors stay as initialised: %s", len(left), checkpoint.few(left))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights as (sharded) safetensors and the config beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        save_torch_state_dict(dict(self.state_dict()), folder)

    def init_weights(self, seed: int) -> VideoLLM:
        """Random weights, the same for the same seed: linear maps keep the size of their input, so that attention is
        neither uniform nor one-hot and every layer matters to the result."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("embedding", "query_tokens")):
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
        encoder = cast(nn.ModuleList, copy.encoder.layers)
        for module in (*encoder, copy.projector, *copy.decoder.layers):
            module.compile()
        copy.dequantise = torch.compile(dequantise, dynamic=True)
        return copy.eval()

    def encode(self, pixels: Tensor, impl: Impl = "vkernels") -> Tensor:
        """Frames [f 3 h w] -> features of interleaved clips [m t l c], or of the frames [1 f l c].

        An encoder of clips of t frames takes m = ceil(f / t) of them; clip j holds frames j, j + m, j + 2 m, ... and so
        spans the whole video. The last frame is repeated to fill the last slots; `connect` drops the copies.
        BT-Adapter's pooled output is one frame.
        """
        if len(pixels) == 0:
            raise ValueError("VideoLLM: pixels must hold at least one frame, got 0")
        if not isinstance(self.encoder, Encoder):
            return self.features(pixels[None], impl)
        capacity = self.encoder.config.frames
        if len(pixels) <= capacity:
            return self.encoder(pixels[None], impl)
        clips = math.ceil(len(pixels) / capacity)
        missing = clips * capacity - len(pixels)
        if missing:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        return self.encoder(pixels.unflatten(0, (capacity, clips)).transpose(0, 1), impl)

    def features(self, pixels: Tensor, impl: Impl = "vkernels", keep: Tensor | None = None) -> Tensor:
        """Videos [b t 3 h w] -> [b t l c], those of clips back in the order of time; BT-Adapter for LLaVA gives
        [b 1 l c]. `keep` is what BT-Adapter's branch keeps."""
        encoder, branch = self.encoder, self.config.branch
        if isinstance(encoder, Encoder):
            return torch.stack([rearrange(self.encode(video, impl), "m t l c -> (t m) l c") for video in pixels])
        if isinstance(encoder, BTAdapter) and branch is not None:
            x, z = encoder(pixels, impl, keep)
            return (
                encoder.chat_tokens(x, z, impl)[:, None]
                if branch.output == "chat"
                else encoder.frame_tokens(x, z, impl)
            )
        assert isinstance(encoder, Trunk)
        return encoder.taps(pixels, encoder.depth - 1, encoder.depth, impl)[-1]

    def visual(
        self, features: Tensor, impl: Impl = "vkernels", text: Tensor | None = None, shown: Tensor | None = None
    ) -> Tensor:
        """Features [b t l c] -> rows for the decoder [b t k d], arranged; a Q-Former also reads the questions [b s]."""
        if self.config.connector == "qformer":
            x = self.projector(features, text, shown, impl)
        else:
            x = self.projector(features)
        if self.config.arrange == "mean":
            return x.mean(1, keepdim=True)
        if self.global_local is not None and x.shape[1] > self.config.local_frames:
            return self.global_local(x, self.config.local_frames, impl)
        return x

    def connect(
        self, features: Tensor, frames: int, before: list[int], after: list[int], impl: Impl = "vkernels"
    ) -> tuple[Tensor, Prompt]:
        """Features of one video and text -> decoder inputs [1 s d]: text, frames in the order of time, text."""
        config = self.config
        reads = config.qformer is not None and config.qformer.vocab > 0
        x = self.visual(features, impl, torch.tensor([after]) if reads else None)
        text = self.decoder.embed_tokens(torch.tensor([before + after], dtype=torch.int64))
        shown = frames if config.arrange == "interleave" else x.shape[1]
        prompt = Prompt(len(before), shown, x.shape[2], len(after))
        if impl == "eager":
            visual = rearrange(x, "m t l d -> (t m) l d")[:shown].flatten(0, 1)
            return torch.cat([text[:, : len(before)], visual[None], text[:, len(before) :]], dim=1), prompt
        restore = interleave_clips(*x.shape[:3], frames=shown)
        parts = [("text", prompt.before), ("video", shown * prompt.tokens), ("text", prompt.after)]
        inputs = vk.rearrange([text, x.flatten(0, 2)[None]], assemble(parts, video=restore))
        assert isinstance(inputs, Tensor)
        return inputs, prompt

    def new_caches(self, impl: Impl, length: int) -> list:
        """An empty cache per layer with room for `length` tokens."""
        config = self.config
        layers, group, residual = range(config.decoder.layers), config.kv_group, config.kv_residual
        if impl == "eager":
            if config.kv == "none":
                return [GrowingCache() for _ in layers]
            return [DequantisingCache(config.kv, group, residual, self.dequantise) for _ in layers]
        m, d, dtype = config.decoder.kv_heads, config.decoder.head, self.decoder.lm_head.weight.dtype
        if config.kv == "none":
            return [vk.KVCache(FULL_PRECISION[dtype], b=1, m=m, d=d, capacity=length) for _ in layers]
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
        context = self.config.decoder.context
        if self.config.decoder.rope_scaling == "none" and prompt.length + tokens > context:
            length = f"{prompt.length} + {tokens}"
            raise ValueError(f"VideoLLM: prompt and answer must fit the decoder's {context} positions, got {length}")
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


def _local(path: str | Path) -> Path:
    if Path(path).exists() or not isinstance(path, str) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.bin", "*.pth", "*.json"]))


def _own_config(folder: Path) -> VideoLLMConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise checkpoint.CheckpointError(
            f"checkpoint: {folder} must hold {CONFIG_FILE}, or config must be given, got neither"
        )
    try:
        return VideoLLMConfig.from_dict(json.loads(file.read_text()))
    except ValueError as error:
        raise checkpoint.CheckpointError(f"checkpoint: {file} cannot be used: {error}") from error
