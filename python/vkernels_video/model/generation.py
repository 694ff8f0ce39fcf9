"""Answers, token by token: a greedy loop of our own, and everything else through transformers' GenerationMixin.

A `Session` is the decoder's side of some answers: their prompts, caches, and where every row stands. Prompts of unequal
length stand one after the other in the prefill and each at its own length in the cache; nothing is padded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from vkernels.check import require
from vkernels_video.model.decoder import Prompt, Rotary

if TYPE_CHECKING:
    from vkernels_video.model.videollm import Impl, VideoLLM


@dataclass(frozen=True)
class Answer:
    """Token ids up to the end mark, which is not among them, and what they say."""

    tokens: list[int]
    text: str


class Session:
    """Prompts [1 s d] with room for `tokens` more each, `copies` rows of every prompt (beams, samples).

    A prompt is run once, whatever the copies. One rotary base serves all rows: that of the longest.
    """

    def __init__(
        self, model: VideoLLM, inputs: Sequence[tuple[Tensor, Prompt]], tokens: int, impl: Impl, copies: int = 1
    ):
        config = model.config.decoder
        self.decoder, self.impl, self.copies = model.decoder, impl, copies
        self.prompts = [prompt for _, prompt in inputs]
        self.x: Tensor | None = torch.cat([x for x, _ in inputs], dim=1)
        longest = max(prompt.length for prompt in self.prompts)
        if config.rope_scaling == "none" and longest + tokens > config.context:
            length = f"{longest} + {tokens}"
            raise ValueError(
                f"VideoLLM: prompt and answer must fit the decoder's {config.context} positions, got {length}"
            )
        self.rotary = Rotary.scaled(config, longest + tokens)
        rows = len(inputs) if impl == "eager" else len(inputs) * copies
        room = model.place.room(self.decoder.deal(self.prompts), [prompt.length for prompt in self.prompts], tokens)
        self.caches = model.new_caches(impl, room, rows)
        self.lengths = [prompt.length for prompt in self.prompts for _ in range(copies)]

    @torch.no_grad()
    def start(self) -> Tensor:
        """The prompts: logits [rows vocab]."""
        assert self.x is not None, "a session starts once"
        logits = self.decoder(self.x, [], self.rotary, self.caches, self.prompts, self.impl)
        self.x = None
        if self.impl == "eager" and self.copies > 1:
            self.caches = [[row.copy() for row in rows for _ in range(self.copies)] for rows in self.caches]
        return logits.repeat_interleave(self.copies, dim=0)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """One more token of every row [rows]: logits [rows vocab]."""
        x = self.decoder.embed_tokens(tokens[:, None])
        logits = self.decoder(x, self.lengths, self.rotary, self.caches, None, self.impl)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def reorder(self, index: list[int]) -> None:
        """Row i goes on from row index[i]."""
        if self.impl == "eager":
            self.caches = [[rows[i].copy() for i in index] for rows in self.caches]
        else:
            for cache in self.caches:
                cache.reorder(index)
        self.lengths = [self.lengths[i] for i in index]

    @property
    def bytes(self) -> int:
        """Keys and values of all layers, as stored."""
        if self.impl == "eager":
            return sum(row.bytes for rows in self.caches for row in rows)
        return sum(cache.bytes for cache in self.caches)


class _Steps(PreTrainedModel, GenerationMixin):
    """A session as transformers' generation sees a model: the prompt is one placeholder, the cache is the session."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, session: Session, end: int | None):
        super().__init__(copy(session.decoder.llama))
        self.session, self.decoder = session, session.decoder
        self.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end or 0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Session | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        if past_key_values is None:
            logits = self.session.start()
        else:
            assert input_ids is not None
            logits = self.session.step(input_ids[:, -1])
        return CausalLMOutputWithPast(logits=cast(Any, logits[:, None]), past_key_values=cast(Any, self.session))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if is_first_iteration:
            return {"inputs_embeds": inputs_embeds}
        return {"input_ids": input_ids, "past_key_values": self.session}

    def _reorder_cache(self, past_key_values: Session, beam_idx: Tensor) -> Session:
        past_key_values.reorder(beam_idx.tolist())
        return past_key_values


@torch.no_grad()
def answer(
    model: VideoLLM,
    inputs: Sequence[tuple[Tensor, Prompt]],
    tokens: int,
    impl: Impl,
    seed: int | None = None,
    **options: Any,
) -> list[Answer]:
    """What `VideoLLM.answer` returns, from prompts that are ready."""
    said = options.get("generation_config")
    asked = {name: options.get(name, getattr(said, name, None)) for name in ("num_beams", "num_return_sequences")}
    copies = max(count or 1 for count in asked.values())
    sampled = options.get("do_sample", getattr(said, "do_sample", None))
    alike = seed is not None or not sampled or not model.place.shared
    require(alike, "VideoLLM", "seed", "be given to sample on a mesh, the same on every rank", seed)
    ends = options.get("eos_token_id", model.text.end)
    marks = set(ends if isinstance(ends, list) else [ends])
    steps = _Steps(Session(model, inputs, tokens, impl, copies), model.text.end)
    placeholder = torch.zeros(len(inputs), 1, 1, device=steps.device)
    shown = torch.ones(len(inputs), 1, dtype=torch.int64, device=steps.device)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        rows = cast(Any, steps).generate(
            inputs_embeds=placeholder, attention_mask=shown, max_new_tokens=tokens, **options
        )
    answers = []
    for row in rows.tolist():
        ids = list(takewhile(lambda token: token not in marks, row))
        answers.append(Answer(ids, model.text.decode(ids)))
    return answers


class _Queue(BaseStreamer):
    """Tokens as they come, to another thread; the prompt, which transformers puts first, is empty here."""

    def __init__(self) -> None:
        self.items: queue.Queue[int | BaseException | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist():
            self.items.put(token)

    def end(self) -> None:
        self.items.put(None)


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream(model: VideoLLM, inputs: tuple[Tensor, Prompt], tokens: int, impl: Impl, **options: Any) -> Iterator[int]:
    """Tokens of one answer, its end mark excepted, while a thread makes them. Dropping the iterator stops it."""
    rule = "be None to stream, which one process may stop before the others"
    require(not model.place.shared, "VideoLLM", "mesh", rule, f"{model.place}")
    tokens_out, stopped = _Queue(), threading.Event()

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([_Stop(stopped)])
            answer(model, [inputs], tokens, impl, streamer=tokens_out, stopping_criteria=criteria, **options)
        except BaseException as error:  # whatever it is, it belongs to the caller
            tokens_out.items.put(error)
            tokens_out.items.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := tokens_out.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item == model.text.end:
                break
            yield item
    finally:
        stopped.set()
        thread.join()
