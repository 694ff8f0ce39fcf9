"""The reference model's stages, plain PyTorch against vkernels over the same weights, for `bench --stages`.

Outputs are compared before anything is timed. A round runs each side once; the median of the rounds' ratios stands with
its 20th and 80th percentile. Memory is the peak of what torch's allocator handed out in one run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vkernels.bench.measure import relative_error
from vkernels.bench.memory import peak_mb
from vkernels.bench.results import Stage
from vkernels_video.model import VideoLLM, preset
from vkernels_video.model.bt_adapter import BTAdapter
from vkernels_video.model.config import BranchConfig, QFormerConfig, TaskConfig, TrunkConfig
from vkernels_video.model.generation import Session
from vkernels_video.model.masking import random_keep, tube_keep
from vkernels_video.model.presets import gpt2
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import MVMHead, training_losses
from vkernels_video.model.tasks import TaskModel
from vkernels_video.model.videollm import Impl

SIDES: tuple[Impl, ...] = ("eager", "vkernels")
Side = Callable[[Impl], object]


@dataclass(frozen=True)
class Case:
    """A stage of a model: `make` prepares it, and gives what one run of a side does."""

    id: str
    dtype: torch.dtype
    make: Callable[[torch.dtype], Side]
    target: float | None = None
    tolerance: float = 1e-4


def prefill(dtype: torch.dtype) -> Side:
    """The `small` preset with 32 frames: 8,200 tokens, scaled positions, frames that see themselves whole."""
    model, x = _small(dtype, 32)
    return lambda impl: Session(model, [x], 1, impl).start()


def decode(dtype: torch.dtype) -> Side:
    """One token after those 32 frames, from an int4 cache."""
    model, x = _small(dtype, 32)
    sessions = {impl: Session(model, [x], 400, impl) for impl in ("eager", "vkernels")}
    token = torch.tensor([7])
    for session in sessions.values():
        session.start()
    return lambda impl: sessions[impl].step(token)


def answer(frames: int, **changes: Any) -> Callable[[torch.dtype], Side]:
    """A whole model: pixels to sixteen tokens. `changes` make another paper's model of the `small` one."""

    def make(dtype: torch.dtype) -> Side:
        model = VideoLLM(replace(preset("small"), **changes)).init_weights(0).to(dtype).eval()
        pixels = torch.randn(frames, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
        return lambda impl: model.generate(pixels, "what moves?", 16, impl).logits[0]

    return make


def _small(dtype: torch.dtype, frames: int) -> tuple[VideoLLM, tuple]:
    model = VideoLLM.from_preset("small").to(dtype).eval()
    width = model.config.encoder.width
    clips = frames // 8
    features = torch.randn(clips, 8, 257, width).to(dtype)  # the encoder is a stage of its own
    return model, model.connect(features, frames, [256], list(b"what moves?"))


def training(dtype: torch.dtype) -> Side:
    """ST-LLM's step: four videos of 16 x 32 tokens, half of them dropped, in sequences of 300 to 900, short answers,
    the pass that sees everything, gradients of all weights. Vocabulary over width is that of the 7B model."""
    config = preset("small").with_options(vocab=4001, frame_attention="causal", rope_scaling="none")
    model = VideoLLM(config).init_weights(0).to(dtype)
    decoder, head = model.decoder, MVMHead(config.decoder.width).to(dtype)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(4, 512, config.decoder.width, generator=generator).to(dtype)
    keep = random_keep(4, 512, 0.5, generator)
    examples = [Example([1] * 4, list(range(length)), list(range(8))) for length in (32, 232, 432, 632)]
    watched = decoder.layers[0].self_attn.v_proj.weight

    def run(impl: Impl) -> list[Tensor]:
        for parameter in (*decoder.parameters(), *head.parameters()):
            parameter.grad = None
        loss = training_losses(decoder, head, examples, video, keep, impl)["total"]
        loss.backward()
        assert watched.grad is not None
        return [loss.detach(), watched.grad]

    return run


def branch(b: int, t: int, kept: float | None) -> Callable[[torch.dtype], Side]:
    """BT-Adapter's branch of three layers, 512 wide, on the trunk's tokens; whole, or with tubes dropped."""

    def make(dtype: torch.dtype) -> Side:
        torch.manual_seed(0)
        trunk = TrunkConfig(width=512, heads=8, layers=3, mlp=2048, projection=64)
        model = BTAdapter(trunk, BranchConfig(layers=3)).eval()
        for layer in model.btadapter_T_layers:
            torch.nn.init.normal_(layer.temporal_fc.weight, 0, 0.02)  # it starts as zero, which would show nothing
        model = model.to(dtype)
        taps = [torch.randn(b, t, 257, 512).to(dtype) for _ in range(3)]
        keep = None if kept is None else tube_keep(b, t, 256, 1 - kept, generator=torch.Generator().manual_seed(0))

        def run(impl: Impl) -> Tensor:
            with torch.inference_mode():
                return model.run_branch(taps, impl, keep)

        return run

    return make


def task(dtype: torch.dtype) -> Side:
    """VideoLLM's states of 1,000 units of 16 cells, as wide as GPT-2's small, and the classes of each."""
    torch.manual_seed(0)
    reasoner = gpt2("small", prefix=8)
    model = TaskModel(TaskConfig("online_action_detection", features=768, classes=97, reasoner=reasoner)).to(dtype)
    model.eval()
    units = torch.randn(1, 1000, 16, 768).to(dtype)

    def run(impl: Impl) -> Tensor:
        with torch.inference_mode():
            return model(units, impl=impl)["now"]

    return run


TRUNK = TrunkConfig(width=512, heads=8, layers=6, mlp=2048, projection=512)
BT_ADAPTER: dict[str, Any] = dict(
    encoder=TRUNK, branch=BranchConfig(layers=3), connector="linear", arrange="all", kv="none"
)
ST_LLM: dict[str, Any] = dict(
    encoder=TRUNK,
    connector="qformer",
    qformer=QFormerConfig(source=512, width=384, heads=6, layers=6, mlp=1536, vocab=259),
    arrange="all",
    kv="none",
)

CASES = (
    Case("INTP, prefill of 32 frames (8.2k tokens), `small`", torch.float32, prefill, 1.5),
    Case("INTP, prefill of 32 frames (8.2k tokens), `small`", torch.bfloat16, prefill, 1.5, 5e-2),
    Case("INTP, one token after 32 frames, int4 cache, `small`", torch.float32, decode, None, 1e-1),
    Case("INTP, 8 frames to 16 tokens, `small`", torch.float32, answer(8), 1.0, 1e-2),
    Case("BT-Adapter, 16 frames to 16 tokens, width 512", torch.float32, answer(16, **BT_ADAPTER), 1.0),
    Case("ST-LLM, 16 frames to 16 tokens, width 512", torch.float32, answer(16, **ST_LLM), 1.0),
    Case("VideoLLM, 1,000 units to actions, GPT-2 small", torch.float32, task, 1.0),
    Case(
        "ST-LLM, training step with masks and MVM, 4 sequences of 300 to 900, width 512", torch.float32, training, 1.5
    ),
    Case("BT-Adapter, branch of 3 layers, 16 frames, width 512", torch.float32, branch(1, 16, None), 2.0),
    Case("BT-Adapter, branch of 3 layers, 16 frames, width 512", torch.bfloat16, branch(1, 16, None), 2.0, 5e-2),
    Case("BT-Adapter, branch of 3 layers, 4 x 8 frames, 70 % of tubes dropped", torch.float32, branch(4, 8, 0.3), 2.0),
)


def measured(case: Case, seconds: float) -> Stage:
    """AssertionError where the sides disagree."""
    run = case.make(case.dtype)
    error = relative_error(run("vkernels"), run("eager"))
    assert error <= case.tolerance, f"{case.id}: the sides differ by {error:.2e}"
    peak = {impl: peak_mb(lambda impl=impl: run(impl)) for impl in SIDES}
    times: dict[str, list[float]] = {impl: [] for impl in SIDES}
    gc.collect()
    end = time.perf_counter() + seconds
    while len(times["eager"]) < 5 or (time.perf_counter() < end and len(times["eager"]) < 40):
        for impl in SIDES:
            start = time.perf_counter()
            run(impl)
            times[impl].append(time.perf_counter() - start)
    ratios = sorted(r / o for o, r in zip(times["vkernels"], times["eager"], strict=True))
    return Stage(
        stage=case.id,
        dtype=str(case.dtype).removeprefix("torch."),
        plain_ms=statistics.median(times["eager"]) * 1e3,
        ours_ms=statistics.median(times["vkernels"]) * 1e3,
        ratio=statistics.median(ratios),
        ratio_p20=ratios[len(ratios) // 5],
        ratio_p80=ratios[4 * len(ratios) // 5],
        model=case.id.split(",")[0],
        target=case.target,
        plain_mb=peak["eager"],
        ours_mb=peak["vkernels"],
    )


def stages(match: str, seconds: float) -> Iterator[Stage | str]:
    """Every stage whose name holds `match`; a sentence for one whose sides disagree."""
    for case in CASES:
        if match in case.id:
            try:
                yield measured(case, seconds)
            except AssertionError as error:
                yield str(error)
