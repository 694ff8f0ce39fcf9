"""Answers: the greedy loop, transformers' generation over our caches, and recomputation without a cache are one thing.

The witnesses are recomputation of the whole prompt for every token, an exhaustive search over all sequences of a tiny
vocabulary, a beam search written by hand over recomputed logits, and the frequencies of a softmax.
Trusted after mutation: planted bugs (positions that run ahead, caches that are not reordered, or shared between beams,
prompts repeated in the wrong order, logits of the wrong row) each turned a test red.
"""

import itertools
import threading

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("einops")

from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from vkernels_video.model import VideoLLM, generation, preset
from vkernels_video.model.decoder import Prompt, Rotary

IMPLS = ("eager", "vkernels")
VIDEOS = [torch.randn(f, 3, 42, 42, generator=torch.Generator().manual_seed(f)) for f in (8, 3, 5)]
QUESTIONS = ["what?", "who moves first of all?", ""]


@pytest.fixture(scope="module")
def st_llm() -> VideoLLM:
    return VideoLLM.from_preset("tiny_st_llm_qa", seed=2).eval()


def clips(**changes) -> VideoLLM:
    """The preset of interleaved clips, whose frames see each other whole."""
    return VideoLLM(preset("tiny").with_options(**{"rope_scaling": "none", "context": 512, **changes})).init_weights(1)


def recomputed(model: VideoLLM, x: Tensor, prompt: Prompt, tokens: list[int], impl: str, rotary: Rotary) -> Tensor:
    """Logits after `tokens`, from the whole sequence at once."""
    words = model.decoder.embed_tokens(torch.tensor([tokens], dtype=torch.int64))
    longer = Prompt(prompt.before, prompt.frames, prompt.tokens, prompt.after + len(tokens))
    caches = model.new_caches("eager", longer.length)
    with torch.no_grad():
        return model.decoder(torch.cat([x, words], dim=1), [], rotary, caches, [longer], "eager")[0]


def greedy(model: VideoLLM, x: Tensor, prompt: Prompt, count: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(recomputed(model, x, prompt, chosen, "eager", Rotary(10_000.0)).argmax()))
    return chosen


# --- one answer, three ways


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_is_the_loop_is_recomputation(st_llm, impl):
    for video, question in zip(VIDEOS, QUESTIONS, strict=True):
        with torch.no_grad():
            inputs = st_llm.prepare(video, question, impl)
        expected = greedy(st_llm, *inputs, 8)
        assert st_llm.generate(video, question, 8, impl).tokens == expected
        assert st_llm.answer([video], [question], 8, impl)[0].tokens == expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frame_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("kv", ["none", "int4", "int2"])
def test_rows_of_a_batch_are_single_answers(impl, frame_attention, kv):
    """Unequal frames and questions, quantised caches included: nothing of one row reaches another."""
    model = clips(kv=kv, frame_attention=frame_attention)
    single = [model.generate(v, q, 24, impl).tokens for v, q in zip(VIDEOS, QUESTIONS, strict=True)]
    both = model.answer(VIDEOS, QUESTIONS, 24, impl)
    model.text.end, end = None, model.text.end  # the loop goes on past the end mark
    unended = model.answer(VIDEOS, QUESTIONS, 24, impl)
    assert [answer.tokens for answer in unended] == single
    assert [answer.tokens for answer in both] == [row[: row.index(end)] if end in row else row for row in single]


def test_a_scaled_base_is_that_of_the_longest():
    model = clips(rope_scaling="ntk", context=64, kv="none")
    longest = max(model.generate(v, q, 6).rotary_base for v, q in zip(VIDEOS, QUESTIONS, strict=True))
    with torch.no_grad():
        inputs = [model.prepare(v, q) for v, q in zip(VIDEOS, QUESTIONS, strict=True)]
    for answer, prepared in zip(model.answer(VIDEOS, QUESTIONS, 6), inputs, strict=True):
        chosen: list[int] = []
        for _ in range(6):
            chosen.append(int(recomputed(model, *prepared, chosen, "eager", Rotary(longest)).argmax()))
        assert answer.tokens == chosen


# --- beams


def few_words(words: int = 5) -> tuple[VideoLLM, list[tuple[Tensor, Prompt]]]:
    """A model of five words and two prompts of unequal length for it."""
    model = VideoLLM(preset("tiny_bt_llava").with_options(vocab=words)).init_weights(5).eval()
    prompts = [Prompt(0, 1, 4, 2), Prompt(0, 1, 7, 1)]
    return model, [
        (torch.randn(1, p.length, 128, generator=torch.Generator().manual_seed(p.length)), p) for p in prompts
    ]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("end", [None, 3])
def test_wide_beams_find_the_best_of_all_sequences(impl, end):
    """25 beams over 5 words and 3 tokens leave nothing out: the winner is that of all 125 sequences, scored by the mean
    log probability of what comes up to the end mark."""
    model, inputs = few_words()
    model.text.end = end
    found = generation.answer(model, inputs, 3, impl, num_beams=25, length_penalty=1.0, early_stopping="never")
    for (x, prompt), answer in zip(inputs, found, strict=True):
        after = {
            ids: recomputed(model, x, prompt, list(ids), impl, Rotary(10_000.0)).log_softmax(-1).tolist()
            for length in range(3)
            for ids in itertools.product(range(5), repeat=length)
        }
        scores = {}
        for sequence in itertools.product(range(5), repeat=3):
            stop = sequence.index(end) + 1 if end in sequence else 3
            scores[sequence[:stop]] = sum(after[sequence[:i]][sequence[i]] for i in range(stop)) / stop
        best = max(scores, key=scores.__getitem__)
        assert tuple(answer.tokens) == tuple(i for i in best if i != end)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kv", ["none", "int2"])
def test_narrow_beams_are_those_written_by_hand(impl, kv):
    """Two beams over six tokens. At two bits the witness is the row that a greedy session with the same past makes."""
    model = VideoLLM(preset("tiny_bt_llava").with_options(vocab=9, kv=kv, kv_group=32, kv_residual=0)).init_weights(7)
    prompt = Prompt(0, 1, 40, 1)
    model.text.end = None
    differ = 0
    for seed in range(4):
        x = torch.randn(1, prompt.length, 128, generator=torch.Generator().manual_seed(seed))
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(4):
            grown = []
            for score, ids in beams:
                session = generation.Session(model, [(x, prompt)], 4, impl)
                with torch.no_grad():
                    logits = session.start()
                    for token in ids:
                        logits = session.step(torch.tensor([token]))
                grown += [(score + p, [*ids, t]) for t, p in enumerate(logits[0].log_softmax(-1).tolist())]
            beams = sorted(grown, reverse=True)[:2]
        plain, beamed = (generation.answer(model, [(x, prompt)], 4, impl, num_beams=n)[0].tokens for n in (1, 2))
        assert beamed == beams[0][1]
        differ += plain != beamed
    assert differ  # or the test would show nothing


@pytest.mark.parametrize("impl", IMPLS)
def test_beams_of_a_batch_are_those_of_single_videos_and_the_prompt_runs_once(st_llm, impl, monkeypatch):
    single = [st_llm.answer([v], [q], 8, impl, num_beams=3)[0] for v, q in zip(VIDEOS, QUESTIONS, strict=True)]
    rows, forward = [], st_llm.decoder._layers
    monkeypatch.setattr(st_llm.decoder, "_layers", lambda x, *rest: rows.append(x.shape[:2]) or forward(x, *rest))
    assert st_llm.answer(VIDEOS, QUESTIONS, 8, impl, num_beams=3) == single
    prompts = sum(st_llm.prepare(v, q, impl)[1].length for v, q in zip(VIDEOS, QUESTIONS, strict=True))
    assert rows[0] == (1, prompts)
    assert set(rows[1:]) == {(9, 1)}


@pytest.mark.parametrize("impl", IMPLS)
def test_reordered_rows_keep_their_places(st_llm, impl):
    """Rows of videos of unequal length change places: each goes on as it would have."""
    with torch.no_grad():
        inputs = [st_llm.prepare(v, q, impl) for v, q in zip(VIDEOS, QUESTIONS, strict=True)]
    moved, still = (generation.Session(st_llm, inputs, 4, impl) for _ in range(2))
    moved.start(), still.start()
    tokens = torch.tensor([5, 6, 7])
    moved.step(tokens), still.step(tokens)
    moved.reorder([2, 0, 0])
    got, expected = moved.step(tokens[[1, 1, 2]]), still.step(tokens[[1, 2, 1]])
    assert (got[[1, 0]] - expected[[0, 2]]).norm() <= 1e-4 * expected.norm()
    assert moved.lengths == [still.lengths[i] for i in (2, 0, 0)]


# --- sampling


def test_samples_follow_the_softmax():
    """Two thousand first tokens at temperature 2: frequencies as the softmax has them, within five standard errors."""
    model, inputs = few_words()
    model.text.end = None
    n = 2000
    drawn = generation.answer(
        model, inputs[:1], 1, "vkernels", seed=0, do_sample=True, temperature=2.0, top_k=0, num_return_sequences=n
    )
    counts = torch.tensor([answer.tokens[0] for answer in drawn]).bincount(minlength=5)
    p = (recomputed(model, *inputs[0], [], "eager", Rotary(10_000.0)) / 2).softmax(-1)
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_top_k_and_top_p_leave_the_rest_out():
    model, inputs = few_words()
    model.text.end = None
    p = recomputed(model, *inputs[0], [], "eager", Rotary(10_000.0)).softmax(-1)
    order = p.argsort(descending=True)
    nucleus = int((p[order].cumsum(0) < 0.7).sum()) + 1
    for options, allowed in (({"top_k": 2}, order[:2]), ({"top_k": 0, "top_p": 0.7}, order[:nucleus])):
        drawn = generation.answer(
            model, inputs[:1], 1, "vkernels", seed=1, do_sample=True, num_return_sequences=200, **options
        )
        assert {answer.tokens[0] for answer in drawn} == set(allowed.tolist())


def test_a_seed_repeats_and_leaves_torchs_own_alone(st_llm):
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a, b, c = (st_llm.answer(VIDEOS, QUESTIONS, 8, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert a == b != c
    assert a == st_llm.answer(VIDEOS, QUESTIONS, 8, "eager", seed=3, **options)
    one = st_llm.answer(VIDEOS, QUESTIONS, 8, seed=3, do_sample=True, top_k=1)
    assert one == st_llm.answer(VIDEOS, QUESTIONS, 8)


# --- streams


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("impl", IMPLS)
def test_a_stream_is_the_answer(st_llm, impl):
    answer = st_llm.answer(VIDEOS[:1], QUESTIONS[:1], 10, impl)[0]
    kept = Kept()
    assert st_llm.answer(VIDEOS[:1], QUESTIONS[:1], 10, impl, streamer=kept) == [answer]
    assert (kept.tokens, kept.ended) == (answer.tokens, True)
    assert list(st_llm.stream(VIDEOS[0], QUESTIONS[0], 10, impl)) == answer.tokens
    sampled = {"do_sample": True, "seed": 5}
    expected = st_llm.answer(VIDEOS[:1], QUESTIONS[:1], 10, impl, **sampled)[0].tokens
    assert list(st_llm.stream(VIDEOS[0], QUESTIONS[0], 10, impl, **sampled)) == expected


def test_a_dropped_stream_stops_and_an_error_comes_out(st_llm):
    before = threading.active_count()
    tokens = st_llm.stream(VIDEOS[0], "", 150)
    next(tokens)
    assert threading.active_count() == before + 1
    tokens.close()
    assert threading.active_count() == before

    class Broken(StoppingCriteria):
        def __call__(self, *_, **__):
            raise RuntimeError("broken")

    with pytest.raises(ValueError, match="nonsense"):
        list(st_llm.stream(VIDEOS[0], "", 4, nonsense=1))
    with pytest.raises(RuntimeError, match="broken"):
        list(st_llm.stream(VIDEOS[0], "", 4, logits_processor=[Broken()]))


def test_an_answer_ends_at_its_mark(st_llm, monkeypatch):
    free = st_llm.generate(VIDEOS[0], "what?", 10).tokens
    monkeypatch.setattr(st_llm.text, "end", free[4])
    stop = free.index(free[4])
    assert st_llm.answer(VIDEOS[:1], ["what?"], 10)[0].tokens == free[:stop]
    assert list(st_llm.stream(VIDEOS[0], "what?", 10)) == free[:stop]
    other = free.index(free[2])
    for mark in (free[2], [free[2], 300]):
        assert st_llm.answer(VIDEOS[:1], ["what?"], 10, eos_token_id=mark)[0].tokens == free[:other]


def test_a_generation_config_is_as_good_as_options(st_llm):
    expected = st_llm.answer(VIDEOS, QUESTIONS, 6, num_beams=2)
    config = GenerationConfig(num_beams=2, eos_token_id=st_llm.text.end, pad_token_id=0)
    assert st_llm.answer(VIDEOS, QUESTIONS, 6, generation_config=config) == expected


# --- bad input


def test_refusals(st_llm):
    video = VIDEOS[0]
    for arguments, sentence in (
        (([], []), "VideoLLM: videos must hold at least one, got 0"),
        (([video], []), "VideoLLM: questions must be 1, one a video, got 0"),
        (([video], ["?"], 0), "VideoLLM: tokens must be at least 1, got 0"),
        (([video[:0]], ["?"]), "VideoLLM: pixels must hold at least one frame, got 0"),
        (([video[:, :1]], ["?"]), r"VideoLLM: pixels must be frames \(f, 3, 42, 42\), got \(8, 1, 42, 42\)"),
        (([video], ["?" * 300], 4), "QFormer: text must have at most 64 tokens, got 300"),
        (([video], ["?"], 300), r"must fit the decoder's 256 positions, got 34 \+ 300"),
    ):
        with pytest.raises(ValueError, match=sentence):
            st_llm.answer(*arguments)
    with pytest.raises(ValueError, match="nonsense"):
        st_llm.answer([video], ["?"], 4, nonsense=True)
