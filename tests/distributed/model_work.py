"""What the ranks do with the reference model. Every function runs on each of them with the same arguments."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from vkernels_video.model import VideoLLM, from_preset, preset
from vkernels_video.model.generation import Session
from vkernels_video.model.masking import random_keep
from vkernels_video.model.mesh import Place
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import training_losses

import vkernels as vk
from vkernels import distributed as vd

EXAMPLES = [Example([256], [104, 105, 63], [110, 111, 257]), Example([256, 9], [7], [50])]


@cache
def group(world: int) -> dist.ProcessGroup:
    """The first so many ranks; the others have no part in it."""
    return dist.new_group(list(range(world)), timeout=timedelta(seconds=20))


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


def difference(one: VideoLLM, mine: VideoLLM) -> float:
    """Of the gradients, the second model's as they stand, each against its largest number."""
    worst = 0.0
    for (name, a), b in zip(one.named_parameters(), mine.parameters(), strict=True):
        if a.grad is None:
            continue
        assert b.grad is not None, name
        grad = b.grad.full_tensor() if isinstance(b.grad, DTensor) else b.grad
        worst = max(worst, float((a.grad - grad).abs().max() / a.grad.abs().max().clamp_min(1e-3)))
    return worst


def trained(world: int, name: str, frames: int, masked: bool) -> float:
    """Largest difference of losses, and of gradients averaged over the ranks, from one process."""
    pair = models(world, name)
    if pair is None:
        return 0.0
    want, got = (training(model, frames, masked) for model in pair)
    assert want.keys() == got.keys()
    worst = max(abs(float((want[key] - got[key]).detach())) for key in want)
    for losses in (want, got):
        losses["total"].backward()
    for parameter in pair[1].parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, dist.ReduceOp.SUM, group(world))
            parameter.grad /= world
    return max(worst, difference(*pair))


class Step(nn.Module):
    """A training step as a module, which DDP and FSDP wrap."""

    def __init__(self, model: VideoLLM):
        super().__init__()
        self.model = model

    def forward(self, frames: int, masked: bool) -> Tensor:
        return training(self.model, frames, masked)["total"]


def engine(kind: str) -> float:
    """The step under DDP, or under FSDP2 with activation checkpointing, on a DeviceMesh of all ranks."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    made = config("tiny_st_llm_conversation")
    one, mine = VideoLLM(made).init_weights(0), VideoLLM(made, mesh=mesh).init_weights(0)
    step: nn.Module = Step(mine)
    if kind == "ddp":
        step = DistributedDataParallel(step, find_unused_parameters=True)
    else:
        for layer in (*mine.encoder.layers, *mine.decoder.layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            fully_shard(layer, mesh=mesh)
        fully_shard(step, mesh=mesh)
    want, got = training(one, 6, True)["total"], step(6, True)
    want.backward()
    got.backward()
    return max(abs(float((want - got).detach())), difference(one, mine))


def generated(world: int, name: str, frames: int, tokens: int) -> float:
    """Largest difference of a greedy answer's logits from one process's; the tokens must be equal."""
    pair = models(world, name, kv="none")
    if pair is None:
        return 0.0
    one, mine = (model.eval().generate(film(model, frames), "what moves?", tokens) for model in pair)
    assert mine.tokens == one.tokens
    assert mine.prompt == one.prompt
    assert mine.cache_bytes < one.cache_bytes
    return float((mine.logits - one.logits).abs().max())


def counted(world: int) -> bool:
    """An answer sends what the page says: features, rows, keys and values per layer, and so much per step."""
    pair = models(world, "digits")
    if pair is None:
        return True
    model, frames, tokens = pair[1].eval(), 7, 3
    with vd.traffic() as sent:
        prompt = model.generate(film(model, frames), "what moves?", tokens).prompt
    encoder, decoder, others = model.config.encoder, model.config.decoder, world - 1
    shards = vd.plan_shards(prompt.mask(decoder.frame_attention), world)
    layer = vd.forward_cost("ring", shards, dist.get_rank(), 1, decoder.heads, decoder.kv_heads, decoder.head, 4).bytes
    most = -(-frames // world) * prompt.tokens
    prefill = others * (most * (encoder.width + decoder.width) + decoder.width) * 4 + decoder.layers * layer
    step = others * decoder.layers * decoder.heads * (decoder.head + 1) * 4
    return sent.bytes == prefill + (tokens - 1) * step


def kept(world: int) -> bool:
    """Each rank's caches hold its part of the prompt, and of the new tokens those at positions it has by the modulo."""
    pair = models(world, "tiny")
    if pair is None:
        return True
    model, more = copy.deepcopy(pair[1]).eval(), 5  # a copy has its tokens on the same ranks
    x, prompt = model.prepare(film(model, 7), "what moves?")
    session = Session(model, [(x, prompt)], more, "vkernels")
    session.start()
    for token in range(more):
        session.step(torch.tensor([token]))
    mask, rank = prompt.mask(model.config.decoder.frame_attention), dist.get_rank()
    held = len(vd.plan_shards(mask, world).tokens[rank])
    held += sum(position % world == rank for position in range(prompt.length, prompt.length + more))
    return all(cache.length() == held for cache in session.caches)


class Cut(Place):
    """What `Ranks` computes with cut caches, in one process: a cache per rank, and their outputs merged."""

    def __init__(self, world: int):
        self.world = world
        self.caches: dict[vk.KVCache, list[vk.KVCache]] = {}

    def attend(self, q, k, v, cache, deal, lengths):
        like = {name: getattr(cache, name) for name in ("b", "m", "d", "capacity", "group", "residual", "dtype")}
        self.caches[cache] = parts = [vk.KVCache(cache.scheme, **like) for _ in range(self.world)]
        for part, rows in zip(parts, vd.plan_shards(deal, self.world).tokens, strict=True):
            if len(rows):
                part.append(k[:, rows], v[:, rows])
        return super().attend(q, k, v, None, deal, lengths)

    def step(self, q, k, v, cache, positions):
        parts = self.caches[cache]
        parts[positions[0] % self.world].append(k, v)
        outs, lses = zip(*(vk.decode_attention(q, part, return_lse=True) for part in parts), strict=True)
        return vk.merge_attentions(list(outs), list(lses))[0]


def quantised(world: int, scheme: str) -> tuple[float, float]:
    """Logits on a cut cache of codes against the same cuts in one process, and against one cache that is whole."""
    pair = models(world, "tiny", kv=scheme)
    if pair is None:
        return 0.0, 1.0
    one, mine = (model.eval() for model in pair)
    pixels = film(one, 19)
    whole = one.generate(pixels, "what moves?", 12).logits
    one.decoder.place = Cut(world)
    want, got = (model.generate(pixels, "what moves?", 12).logits for model in (one, mine))
    return float((got - want).norm() / want.norm()), float((got - whole).norm() / want.norm())


def answered(world: int, **options) -> bool:
    """A batch of unequal prompts through transformers' generation: the tokens of one process."""
    pair = models(world, "tiny_st_llm_conversation")
    if pair is None:
        return True
    films, questions = [film(pair[0], frames) for frames in (6, 9)], ["what moves?", "who?"]
    one, mine = (model.eval().answer(films, questions, 5, **options) for model in pair)
    return [answer.tokens for answer in one] == [answer.tokens for answer in mine]


def refused(kind: str) -> None:
    """A call a model on a mesh cannot serve."""
    world = dist.get_world_size()
    if kind == "mesh":
        VideoLLM.from_preset("tiny", mesh=dist.init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tokens")))
    if kind == "task":
        from_preset("tiny_videollm_t5", mesh=dist.group.WORLD)
    model = VideoLLM.from_preset("tiny", mesh=dist.group.WORLD).eval()
    pixels = film(model, 5 + 4 * (kind == "frames" and dist.get_rank() == world - 1))
    if kind == "stream":
        next(model.stream(pixels, "?", 2))
    if kind == "seed":
        model.answer([pixels], ["?"], 2, do_sample=True)
    model.generate(pixels, "?", 2, "eager" if kind == "impl" else "vkernels")
