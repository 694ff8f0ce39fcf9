"""The reference video-LLM: encoder -> projector -> frames back in order -> decoder, in two implementations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

import vkernels as vk
from vkernels.check import require
from vkernels.rearrangement import assemble, interleave_clips
from vkernels_video.model import checkpoint, connector, generation
from vkernels_video.model.bt_adapter import BTAdapter
from vkernels_video.model.cache import FULL_PRECISION, DequantisingCache, GrowingCache, dequantise
from vkernels_video.model.clip import Trunk
from vkernels_video.model.config import EncoderConfig, VideoLLMConfig
from vkernels_video.model.decoder import Decoder, Prompt
from vkernels_video.model.encoder import Encoder
from vkernels_video.model.generation import Answer, Session
from vkernels_video.model.mesh import Place, Ranks
from vkernels_video.model.presets import preset
from vkernels_video.model.published import refuse_other_decoder
from vkernels_video.model.st_llm import GlobalLocal, MVMHead
from vkernels_video.model.text import (
    BEGIN,
    END,
    FOLDERS,
    QUESTION_FOLDERS,
    Bytes,
    Missing,
    Text,
    Tokenizer,
    find,
)

log = logging.getLogger("vkernels_video")
Impl = Literal["eager", "vkernels"]
__all__ = ["BEGIN", "END", "IMPLS", "Answer", "Generated", "Impl", "VideoLLM"]
IMPLS: tuple[Impl, ...] = ("eager", "vkernels")
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

    mesh: a one-dimensional DeviceMesh or a ProcessGroup whose ranks share the tokens of every prompt, each with these
          weights and called with the same arguments; everyone gets the results (docs/distributed.md)
    """

    def __init__(self, config: VideoLLMConfig, *, mesh: Any = None):
        super().__init__()
        self.config = config
        self.place = Place() if mesh is None else Ranks(mesh)
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
        self.decoder = Decoder(config.decoder, self.place)
        self.dequantise = dequantise
        small = config.tokenizer == "bytes"
        self.text: Text = Bytes() if small else Missing("the tokenizer")
        self.question_text: Text = Bytes() if small else Missing("the Q-Former's tokenizer")

    @classmethod
    def from_preset(cls, name: str, seed: int = 0, *, mesh: Any = None) -> VideoLLM:
        """A preset with seeded random weights."""
        return cls(preset(name), mesh=mesh).init_weights(seed)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *more: str | Path,
        config: VideoLLMConfig | str | None = None,
        allow_missing: Sequence[str] = (),
        mesh: Any = None,
    ) -> VideoLLM:
        """A model with the weights of a folder or file: this library's own, or a layout of `layouts.SOURCES`.

        path, more: what published weights come in, together: BT-Adapter's three files and LLaMA's folder, say. A name
                    that is no path is fetched from the Hugging Face hub
        config:     of the model, or a preset's name; None reads the folder's own, as `save_pretrained` wrote it
        allow_missing: patterns of names that may stay as `init_weights` left them; they are logged
        mesh:       as `VideoLLM` takes it

        Every tensor finds its place or is on its source's list of unused ones; CheckpointError names those that do not.
        Where a tuned model and its base both give a tensor of the decoder, the tuned one counts, and the log says so.
        """
        paths = [checkpoint.local(each) for each in (path, *more)]
        if config is None:
            config = checkpoint.saved_config(paths[0], VideoLLMConfig)
        model = cls(preset(config) if isinstance(config, str) else config, mesh=mesh).init_weights(0)
        for each in paths:
            refuse_other_decoder(model.config.decoder, each)
        left = checkpoint.load(model, *checkpoint.gather(model, paths), allow_missing)
        if left:
            log.warning("from_pretrained: %d tensors stay as initialised: %s", len(left), checkpoint.few(left))
        model.read_tokenizers(paths)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights as (sharded) safetensors and the config beside them."""
        checkpoint.save(folder, self.config.to_dict(), self.state_dict())
        for text, place in ((self.text, "."), (self.question_text, QUESTION_FOLDERS[0])):
            if isinstance(text, Tokenizer):
                text.save(Path(folder) / place)

    def read_tokenizers(self, folders: Sequence[Path]) -> None:
        """The tokenizers of a checkpoint, where the config takes them from there."""
        if self.config.tokenizer == "checkpoint":
            self.text = find(folders, FOLDERS, self.config.decoder.vocab, "the tokenizer")
            if self.config.qformer is not None and self.reads:
                what, vocab = "the Q-Former's tokenizer", self.config.qformer.vocab
                self.question_text = find(folders, QUESTION_FOLDERS, vocab, what, special=True)

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
        require(impl in IMPLS, "VideoLLM", "impl", f"be one of {', '.join(IMPLS)}", repr(impl))
        side, given = self.config.encoder.image, tuple(pixels.shape)
        require(
            len(given) == 4 and given[1:] == (3, side, side),
            "VideoLLM",
            "pixels",
            f"be frames (f, 3, {side}, {side})",
            given,
        )
        require(len(pixels) > 0, "VideoLLM", "pixels", "hold at least one frame", 0)
        if not isinstance(self.encoder, Encoder):
            return self.features(pixels[None], impl)
        capacity = self.encoder.config.frames
        if len(pixels) <= capacity:
            return self.encoder(pixels[None], impl)
        clips = math.ceil(len(pixels) / capacity)
        missing = clips * capacity - len(pixels)
        if missing:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        interleaved = pixels.unflatten(0, (capacity, clips)).transpose(0, 1)
        return self.place.each(lambda clips: self.encoder(clips, impl), interleaved)

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
        return self.place.each(lambda x: encoder.taps(x, encoder.depth - 1, encoder.depth, impl)[-1], pixels, dim=1)

    def visual(
        self, features: Tensor, impl: Impl = "vkernels", text: Tensor | None = None, shown: Tensor | None = None
    ) -> Tensor:
        """Features [b t l c] -> rows for the decoder [b t k d], arranged; a Q-Former also reads the questions [b s]."""
        if self.config.connector == "qformer":
            x = self.place.each(lambda x: self.projector(x, text, shown, impl), features, dim=1)
        else:
            x = self.place.each(self.projector, features.flatten(0, 1)).unflatten(0, features.shape[:2])
        if self.config.arrange == "mean":
            return x.mean(1, keepdim=True)
        if self.global_local is not None and x.shape[1] > self.config.local_frames:
            return self.global_local(x, self.config.local_frames, impl)
        return x

    def connect(
        self,
        features: Tensor,
        frames: int,
        before: list[int],
        after: list[int],
        impl: Impl = "vkernels",
        asked: list[int] | None = None,
    ) -> tuple[Tensor, Prompt]:
        """Features of one video and text -> decoder inputs [1 s d]: text, frames in the order of time, text.
        A Q-Former reads the ids `asked`; None: those after the video."""
        config = self.config
        asked = after if asked is None else asked
        ids, read = (torch.tensor([of], dtype=torch.int64, device=features.device) for of in (before + after, asked))
        x = self.visual(features, impl, read if self.reads else None)
        text = self.decoder.embed_tokens(ids)
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

    def new_caches(self, impl: Impl, length: int, rows: int = 1) -> list:
        """An empty cache per layer with room for `length` tokens of each of `rows` sequences."""
        config = self.config
        layers, group, residual = range(config.decoder.layers), config.kv_group, config.kv_residual
        if impl == "eager":
            if config.kv == "none":
                return [[GrowingCache() for _ in range(rows)] for _ in layers]
            return [
                [DequantisingCache(config.kv, group, residual, self.dequantise) for _ in range(rows)] for _ in layers
            ]
        m, d, weight = config.decoder.kv_heads, config.decoder.head, self.decoder.lm_head.weight
        quantised = config.kv != "none"
        scheme = config.kv if quantised else FULL_PRECISION[weight.dtype]
        more: dict[str, Any] = {"group": group, "residual": residual, "dtype": weight.dtype} if quantised else {}
        return [vk.KVCache(scheme, b=rows, m=m, d=d, capacity=length, device=weight.device, **more) for _ in layers]

    def prompt_ids(self, question: str) -> tuple[list[int], list[int], list[int]]:
        """The config's template around a question: ids before the video, ids after it, and those a Q-Former reads."""
        before, after = (
            self.text.encode(part.replace("{question}", question)) if part else []
            for part in self.config.template.split("{video}")
        )
        begin = [self.text.begin] if self.config.begin and self.text.begin is not None else []
        return begin + before, after, self.question_text.encode(question) if self.reads else []

    @property
    def reads(self) -> bool:
        """Whether the connector reads the question."""
        return self.config.qformer is not None and self.config.qformer.vocab > 0

    def prepare(self, pixels: Tensor, question: str, impl: Impl = "vkernels") -> tuple[Tensor, Prompt]:
        """One video [f 3 h w] and a question as the decoder's input [1 s d], and where everything stands in it."""
        before, after, asked = self.prompt_ids(question)
        return self.connect(self.encode(pixels, impl), len(pixels), before, after, impl, asked)

    @torch.inference_mode()
    def generate(
        self,
        pixels: Tensor,
        question: str,
        tokens: int,
        impl: Impl = "vkernels",
        stage: Stage = lambda name: nullcontext(),
    ) -> Generated:
        """Greedy decoding of `tokens` tokens about frames [f 3 h w], past any end mark, with the logits of each.
        `stage(name)` wraps each stage, for clocks."""
        require(tokens >= 1, "VideoLLM", "tokens", "be at least 1", tokens)
        before, after, asked = self.prompt_ids(question)
        with stage("encoder"):
            features = self.encode(pixels, impl)
        with stage("connector"):
            inputs = self.connect(features, len(pixels), before, after, impl, asked)
        del features
        session = Session(self, [inputs], tokens, impl)
        del inputs
        with stage("prefill"):
            logits = [session.start()]
        with stage("decode"):
            chosen = [logits[0].argmax(-1)]
            while len(chosen) < tokens:
                logits.append(session.step(chosen[-1]))
                chosen.append(logits[-1].argmax(-1))
        ids = [int(token) for token in chosen]
        return Generated(ids, torch.cat(logits), session.prompts[0], session.rotary.base, session.bytes)

    def answer(
        self,
        videos: Sequence[Tensor],
        questions: Sequence[str],
        tokens: int = 256,
        impl: Impl = "vkernels",
        *,
        seed: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answers about a batch of videos [f 3 h w], of as many frames each as it likes, up to the end mark.

        options: what transformers' `generate` takes: do_sample, temperature, top_k, top_p, num_beams, length_penalty,
                 repetition_penalty, num_return_sequences (that many answers per video, side by side), streamer ...
        seed:    of the sampling; None draws from torch's generator
        A video's answer does not depend on the others of its batch, except that one rotary base, that of the longest,
        serves all where the context is scaled.
        """
        require(len(videos) > 0, "VideoLLM", "videos", "hold at least one", len(videos))
        require(
            len(videos) == len(questions), "VideoLLM", "questions", f"be {len(videos)}, one a video", len(questions)
        )
        require(tokens >= 1, "VideoLLM", "tokens", "be at least 1", tokens)
        with torch.no_grad():
            inputs = [self.prepare(video, question, impl) for video, question in zip(videos, questions, strict=True)]
        return generation.answer(self, inputs, tokens, impl, seed, **options)

    def stream(
        self, pixels: Tensor, question: str, tokens: int = 256, impl: Impl = "vkernels", **options: Any
    ) -> Iterator[int]:
        """The tokens of one answer as they come; `options` and `seed` as in `answer`, one beam. A thread makes them:
        until the last has come, a seeded stream has torch's generator to itself."""
        require(tokens >= 1, "VideoLLM", "tokens", "be at least 1", tokens)
        with torch.no_grad():
            inputs = self.prepare(pixels, question, impl)
        return generation.stream(self, inputs, tokens, impl, **options)
