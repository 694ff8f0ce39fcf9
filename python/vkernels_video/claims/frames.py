"""INTP: a model that was trained at 8 frames reads 16 and 32 without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vkernels_video.claims import page, statistics
from vkernels_video.claims.experiment import DIGITS, Claim, Record, record, table, train
from vkernels_video.digits import Film, Studio
from vkernels_video.model import VideoLLM
from vkernels_video.model.config import EncoderConfig
from vkernels_video.model.decoder import Prompt, Rotary
from vkernels_video.model.sequence import Example, inputs, lay
from vkernels_video.model.videollm import BEGIN
from vkernels_video.train import Recipe

KINDS = ("flash", "when")
TRAINED, SHOT, FILMS = 8, 64, 256
CONFIG = replace(
    DIGITS,
    encoder=EncoderConfig(width=64, heads=2, layers=2, image=24, patch=8, frames=TRAINED),
    arrange="interleave",
    mvm=False,
    decoder=replace(DIGITS.decoder, context=TRAINED * 10 + 24, rope_scaling="ntk"),
)
RECIPE = Recipe(steps=500, kinds=KINDS, warm_up=100)
# frames, rotary scaling, order of the clips
ARMS = {
    "8 frames": (8, "none", "interleaved"),
    "16 frames": (16, "none", "interleaved"),
    "16 frames, NTK": (16, "ntk", "interleaved"),
    "32 frames": (32, "none", "interleaved"),
    "32 frames, linear": (32, "linear", "interleaved"),
    "32 frames, NTK": (32, "ntk", "interleaved"),
    "32 frames, NTK, concatenated clips": (32, "ntk", "concatenated"),
}
CACHES = ("none", "int8", "int4", "int2")
CACHED = 128  # films; 32 frames each


def run(seed: int) -> Record:
    model = train(CONFIG, replace(RECIPE, seed=seed), "8 frames")
    arms = {}
    for arm, (frames, scaling, order) in ARMS.items():
        studio = Studio(1, "test", frames, KINDS, SHOT // frames)
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for _ in range(FILMS // 32):
            films = [studio.film() for _ in range(32)]
            for film, answer in zip(films, _answers(model, films, scaling, order), strict=True):
                right[film.kind].append(answer == film.answer)
        arms[arm] = record(right)
    caches = {}
    for scheme in CACHES:
        studio = Studio(2, "test", 32, KINDS, SHOT // 32)
        right, held = {kind: [] for kind in KINDS}, 0
        for _ in range(CACHED):
            film = studio.film()
            answer, held = _cached(model, film, scheme)
            right[film.kind].append(answer == film.answer)
        arms[f"cache {scheme}"], caches[scheme] = record(right), held
    return {"arms": arms, "bytes": caches}


def _rows(model: VideoLLM, pixels: Tensor, order: str) -> Tensor:
    """Video rows [b t k d]. Clip j of m holds frames j, j + m ..., or, concatenated, the j-th stretch of the film."""
    t = pixels.shape[1]
    if order == "interleaved" or t <= TRAINED:
        return model.visual(model.features(pixels))
    slots = torch.arange(t).view(-1, TRAINED).T.flatten()
    return model.visual(model.features(pixels[:, slots]))[:, slots.argsort()]


@torch.inference_mode()
def _answers(model: VideoLLM, films: Sequence[Film], scaling: str, order: str) -> list[str]:
    decoder = model.decoder
    rows = _rows(model, torch.stack([film.frames for film in films]), order).flatten(1, 2)
    examples = [Example([BEGIN], list(film.question.encode()), [0]) for film in films]
    laid = lay(examples, rows.shape[1], packed=True)
    x = inputs(examples, rows, None, decoder.embed_tokens, "vkernels", laid)
    length, context = max(laid.lengths), decoder.config.context
    rotary = Rotary.scaled(decoder.config, length) if scaling == "ntk" else None
    positions = laid.positions
    if scaling == "linear" and length > context:
        positions = positions * (context / length)
    h = decoder.hidden(x, positions, laid.lengths, "vkernels", rotary)
    return [_digit(logits) for logits in decoder.lm_head(decoder.rows(h, laid.predicting, laid.lengths, "vkernels"))]


@torch.inference_mode()
def _cached(model: VideoLLM, film: Film, scheme: str) -> tuple[str, int]:
    """The film goes into a cache, the question is read byte by byte against it; the answer, and the cache's bytes."""
    model.config = model.config.with_options(kv=scheme, kv_group=32, kv_residual=32)
    rows = _rows(model, film.frames[None], "interleaved")[0]
    question = list(film.question.encode())
    length = 1 + rows.shape[:2].numel() + len(question)
    rotary = Rotary.scaled(model.decoder.config, length)
    caches = model.new_caches("vkernels", length)
    x = torch.cat([model.decoder.embed_tokens(torch.tensor([BEGIN])), rows.flatten(0, 1)])[None]
    prompt = Prompt(1, rows.shape[0], rows.shape[1], 0)
    logits = model.decoder(x, [0], rotary, caches, [prompt], "vkernels")
    for i, byte in enumerate(question):
        x = model.decoder.embed_tokens(torch.tensor([[byte]]))
        logits = model.decoder(x, [length - len(question) + i], rotary, caches, None, "vkernels")
    return _digit(logits[0]), sum(cache.bytes for cache in caches)


def _digit(logits: Tensor) -> str:
    return chr(ord("0") + int(logits[ord("0") : ord("9") + 1].argmax()))


def tell(records: list[Record]) -> list[str]:
    short = {arm: table(records, arm, ("flash",)) for arm in ARMS}
    gain16 = statistics.difference(short["16 frames, NTK"], short["8 frames"])
    gain32 = statistics.difference(short["32 frames, NTK"], short["8 frames"])
    plain = statistics.difference(table(records, "32 frames, NTK"), table(records, "32 frames"))
    order = statistics.difference(
        table(records, "32 frames, NTK"), table(records, "32 frames, NTK, concatenated clips")
    )
    lines = [
        f"Trained at {TRAINED} frames ({CONFIG.decoder.context} positions), {RECIPE.steps} steps of {RECIPE.size} "
        f"films; asked about films of {SHOT} frames, of which 8, 16 or 32 are shown. A flash lasts 2 to 8 of the 64.",
        "",
        *page.shares(records, ARMS, KINDS),
        "",
        f"- 16 frames with NTK over 8, flash: {page.points(gain16)}: **{statistics.more(gain16)}**.",
        f"- 32 frames with NTK over 8, flash: {page.points(gain32)}: **{statistics.more(gain32)}**.",
        f"- NTK over no scaling at 32 frames, both kinds: {page.points(plain)}: **{statistics.more(plain)}**.",
        f"- Interleaved over concatenated clips, both kinds: {page.points(order)}: **{statistics.more(order)}**.",
        "",
        "The film in a quantised cache (32 frames, groups of 32, the newest 32 tokens in full precision), the question "
        "read against it:",
        "",
        *page.shares(records, [f"cache {scheme}" for scheme in CACHES], KINDS),
        "",
    ]
    whole = table(records, "cache none")
    for scheme in CACHES[1:]:
        loss = statistics.difference(table(records, f"cache {scheme}"), whole)
        smaller = records[0]["bytes"]["none"] / records[0]["bytes"][scheme]
        lines.append(
            f"- {scheme}: {smaller:.1f}x smaller than float32, accuracy kept (margin 3 points): {page.points(loss)}: "
            f"**{statistics.as_much(loss, 0.03)}**."
        )
    return lines


CLAIM = Claim(
    "frames",
    "More frames without training (INTP)",
    "A model trained at 8 frames gains on short events from 16 and 32, through interleaved clips and a scaled rotary "
    "base; a quantised cache costs no accuracy.",
    3,
    run,
    tell,
)
