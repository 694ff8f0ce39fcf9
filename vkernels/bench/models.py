"""Whose shapes: what one layer of each model asks of our ops at so many frames. Sizes are those of the released
checkpoints' configurations; `source` names where they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import vkernels as vk
from vkernels.bench import make
from vkernels.bench.case import Case
from vkernels.bench.problem import Call, Problem
from vkernels.bench.rivals.moves import pooled
from vkernels.bench.rivals.sdpa import tokens_first
from vkernels.rearrangement import interleave_clips, pixel_unshuffle, pool

CLIP = 8  # frames that LanguageBind's tower sees together


@dataclass(frozen=True)
class Model:
    label: str
    source: str
    cases: Callable[[int], list[Case]]  # of so many frames


def _frames(id: str, step: int, s: int, n: int, d: int) -> Case:
    """Attention inside sequences of `step` tokens laid end to end; by hand, as all are equally long, a batch."""

    def mask() -> vk.VideoMask:
        return vk.VideoMask.from_cu_seqlens(list(range(0, s + 1, step)))

    def batched(problem: Problem) -> Call:
        q, k, v = problem.given("q", "k", "v")

        def call() -> torch.Tensor:
            q_s, k_s, v_s = (x.unflatten(1, (-1, step)).flatten(0, 1) for x in (q, k, v))
            return tokens_first(q_s, k_s, v_s, None).reshape(q.shape)

        return call

    return make.attention(id, 1, s, n, d, mask, rivals={"SDPA, sequences as a batch": batched})


def _decoder(s: int, heads: make.Heads, d: int = 128) -> Case:
    return make.attention(f"prefill of {s:,} tokens, causal", 1, s, heads, d, lambda: vk.VideoMask.causal(s))


def _towers_positions(pairs: int, side: int) -> Callable[[], torch.Tensor]:
    return lambda: vk.rope_positions("grid2d", [(pairs, side, side)])


def _qwen2_5_vl(frames: int) -> list[Case]:
    """448 px: frames in pairs, 32 x 32 patches of 14 px, windows of 8 x 8 in 28 of 32 layers, merged 2 x 2."""
    pairs = max(frames // 2, 1)
    s, text = pairs * 1024, pairs * 256
    mrope = vk.RopeSpec.build(128, 1e6, axes="mrope", sections=(16, 24, 24))
    return [
        _frames(f"tower, windows of 64, {s:,} tokens, d=80", 64, s, 16, 80),
        _frames(f"tower, whole frames of 1,024, {s:,} tokens, d=80", 1024, s, 16, 80),
        make.rotation(
            f"tower, positions of {s:,} tokens, d=80", s, 16, vk.RopeSpec.grid((40, 40)), _towers_positions(pairs, 32)
        ),
        make.prologue(
            f"decoder, bias + M-RoPE + cache, {text:,} tokens", text, (28, 4), mrope,
            lambda: vk.rope_positions("qwen2_vl", [(pairs, 16, 16)]), bias=True, cache="full",
        ),
        _decoder(text, (28, 4)),
    ]  # fmt: skip


def _qwen3_vl(frames: int) -> list[Case]:
    """448 px: frames in pairs, 28 x 28 patches of 16 px, a frame is a sequence, merged 2 x 2."""
    pairs = max(frames // 2, 1)
    s, text = pairs * 784, pairs * 196
    mrope = vk.RopeSpec.build(128, 5e6, axes="mrope_interleaved", sections=(24, 20, 20))
    return [
        _frames(f"tower, frames of 784, {s:,} tokens, d=72", 784, s, 16, 72),
        make.prologue(
            f"decoder, norm + M-RoPE + cache, {text:,} tokens", text, (32, 8), mrope,
            lambda: vk.rope_positions("qwen3_vl", [(1, 14, 14)] * pairs), norms=True, cache="full",
        ),
    ]  # fmt: skip


def _video_llava(frames: int) -> list[Case]:
    """LanguageBind's ViT-L/14 in clips of 8: over time at each of 257 places, then inside each frame; Vicuna-7B."""
    clips = max(frames // CLIP, 1)
    return [
        make.divided(
            f"tower, time, {clips} x 8 frames, 257 places", clips, vk.Grid(CLIP, 1, 257), 16, 64, "temporal"
        ),
        make.attention(f"tower, inside {frames} frames of 257", frames, 257, 16, 64),
        _decoder(257 * frames, 32),
        make.rotation(
            f"decoder, positions of {257 * frames:,} tokens", 257 * frames, 32, vk.RopeSpec.build(128),
            lambda: torch.arange(257 * frames),
        ),
    ]  # fmt: skip


def _st_llm(frames: int) -> list[Case]:
    """EVA ViT-g, 32 Q-Former tokens a frame, half of them dropped in training, between 40 and 24 tokens of text."""
    s = 64 + 32 * frames
    kept = torch.rand(s, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[:40] = kept[-24:] = True

    def mask() -> vk.VideoMask:
        return vk.VideoMask.causal(s).keep(kept, queries=True)

    return [
        make.attention(f"tower, inside {frames} frames of 257, d=88", frames, 257, 16, 88),
        make.attention(f"prefill of {s:,} tokens, half of the video dropped", 4, s, 32, 128, mask),
    ]


def _bt_adapter(frames: int) -> list[Case]:
    """The branch beside CLIP ViT-L/14: tokens patch by patch, one CLS that all frames share."""
    grid = vk.Grid(frames, 16, 16)
    return [
        make.divided(f"branch, time, {frames} frames, 256 places", 1, grid, 16, 64, "temporal", 1, "patch"),
        make.divided(f"branch, inside {frames} frames of 1 + 256", 1, grid, 16, 64, "spatial", 1, "patch"),
    ]


def _intp(frames: int) -> list[Case]:
    """Video-LLaVA, its clips interleaved, the rotary base scaled, the cache in 2 or 4 bits."""
    clips, s = max(frames // CLIP, 1), 257 * frames
    spec = vk.RopeSpec.build(128, 10000.0 * max(s / 4096, 1.0) ** (128 / 126))
    decodes = [
        make.decode(f"one token after {s:,}, {scheme} cache", scheme, 32, 128, s, dtypes=(torch.bfloat16,))
        for scheme in ("int4", "int2")
    ]
    interleaved = make.move(
        f"{clips} clips of 8 interleaved, {s:,} x 4,096", (clips, CLIP * 257, 4096),
        lambda: interleave_clips(clips, CLIP, 257),
    )  # fmt: skip
    return [
        *([interleaved] if clips > 1 else []),
        make.rotation(f"scaled positions of {s:,} tokens", s, 32, spec, lambda: torch.arange(s)),
        *decodes,
        make.append(f"append {s:,} tokens, int2 cache", "int2", 32, 128, s, dtypes=(torch.bfloat16,)),
    ]  # fmt: skip


def _videollama3(frames: int) -> list[Case]:
    """SigLIP at 392 px: frames of 28 x 28 packed into one sequence, two axes of positions, 2 x 2 to one; Qwen2.5-7B."""
    s = 784 * frames
    return [
        _frames(f"tower, {frames} packed frames of 784, d=72", 784, s, 16, 72),
        make.rotation(
            f"tower, positions of {s:,} tokens, d=72", s, 16, vk.RopeSpec.grid((36, 36)), _towers_positions(frames, 28)
        ),
        make.move(
            f"2 x 2 to one, {frames} frames of 28 x 28 x 1,152", (frames, 784, 1152), lambda: pixel_unshuffle(28, 28)
        ),
        _decoder(196 * frames, (28, 4)),
    ]  # fmt: skip


def _llava_onevision(frames: int) -> list[Case]:
    """SigLIP at 384 px, 27 x 27 pooled to 14 x 14; Qwen2-7B."""

    def plan() -> object:
        return pool(frames, 27, 27, mode="bilinear")

    return [
        make.attention(f"tower, inside {frames} frames of 729, d=72", frames, 729, 16, 72),
        make.move(
            f"27x27 -> 14x14 pool, {frames} frames x 3,584", (1, frames * 729, 3584), plan,
            rivals={"permute + pool + permute": lambda problem: lambda: pooled(problem.kwargs["x"], frames, 27, 14)},
        ),
        _decoder(196 * frames, (28, 4)),
    ]  # fmt: skip


HUB = "config.json of huggingface.co/"
MODELS = {
    "qwen2_5_vl": Model("Qwen2.5-VL-7B", HUB + "Qwen/Qwen2.5-VL-7B-Instruct", _qwen2_5_vl),
    "qwen3_vl": Model("Qwen3-VL-8B", HUB + "Qwen/Qwen3-VL-8B-Instruct", _qwen3_vl),
    "video_llava": Model("Video-LLaVA-7B", HUB + "LanguageBind/Video-LLaVA-7B", _video_llava),
    "st_llm": Model("ST-LLM-7B", "arXiv:2404.00308, github.com/TencentARC/ST-LLM", _st_llm),
    "bt_adapter": Model("BT-Adapter on CLIP-L", "arXiv:2309.15785, github.com/farewellthree/BT-Adapter", _bt_adapter),
    "intp": Model("INTP on Video-LLaVA-7B", "arXiv:2409.12963", _intp),
    "videollama3": Model("VideoLLaMA3-7B", HUB + "DAMO-NLP-SG/VideoLLaMA3-7B", _videollama3),
    "llava_onevision": Model("LLaVA-OneVision-7B", HUB + "lmms-lab/llava-onevision-qwen2-7b-ov", _llava_onevision),
}  # fmt: skip


def model_cases(name: str, frames: int) -> list[Case]:
    model = MODELS[name]
    return [replace(case, model=model.label, frames=frames) for case in model.cases(frames)]
