"""Questions to ids and back: bytes, and tokenizers from a checkpoint's folder, written by the tokenizers library."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("einops")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TextStreamer
from vkernels_video.model import VideoLLM, VideoLLMConfig, preset
from vkernels_video.model.text import Bytes

WORDS = ["<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "what", "moves", "?", "a", "cat"]
TEMPLATE = "USER: {video} {question} ASSISTANT:"


def tokenizer(words: list[str] = WORDS, marks: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if marks:
        inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def config(name: str = "tiny_bt_llava", **changes) -> VideoLLMConfig:
    return replace(preset(name), tokenizer="checkpoint", template=TEMPLATE, **changes)


@pytest.fixture
def folder(tmp_path):
    VideoLLM(config()).init_weights(2).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_bytes():
    text = Bytes()
    assert text.encode("é?") == [0xC3, 0xA9, 0x3F]
    assert text.decode([256, 0xC3, 0xA9, 258, 0x3F, 0xFF]) == "é?\ufffd"


def test_a_checkpoints_tokenizer_speaks_for_the_model(folder):
    """The template around the question in its ids; the answer in its words."""
    model = VideoLLM.from_pretrained(folder)
    assert model.prompt_ids("what moves ?") == ([0, 3], [5, 6, 7, 4], [])
    video = torch.randn(4, 3, 42, 42)
    words = iter(model.stream(video, "what moves ?", 6))
    answer = model.answer([video], ["what moves ?"], 6)[0]
    assert list(words) == answer.tokens
    assert answer.text == model.text.decode(answer.tokens)
    assert model.text.decode([5, 6, 1, 8]) == "what moves a"
    _, prompt = model.prepare(video, "what moves ?")
    assert (prompt.before, prompt.after) == (2, 4)


def test_transformers_streamer_prints(folder, capsys):
    model = VideoLLM.from_pretrained(folder)
    with torch.no_grad():  # a word that it cannot help saying
        model.decoder.lm_head.weight.zero_()
        model.decoder.norm.weight.zero_()
    model.answer([torch.randn(2, 3, 42, 42)], ["a"], 3, streamer=TextStreamer(tokenizer()), suppress_tokens=[0, 1, 2])
    assert capsys.readouterr().out.strip() == "USER: USER: USER:"


def test_it_is_saved_with_the_model(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    VideoLLM.from_pretrained(folder).save_pretrained(again)
    assert VideoLLM.from_pretrained(again).prompt_ids("a cat")[1] == [8, 9, 4]


def test_a_q_former_has_its_own(tmp_path):
    """InstructBLIP's layout: another vocabulary in a folder of its own, with its marks around the question."""
    VideoLLM(config("tiny_st_llm_qa", begin=False)).init_weights(2).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tokenizer(["<s>", "</s>", "<unk>", "cat", "a"], marks=True).save_pretrained(tmp_path / "qformer_tokenizer")
    model = VideoLLM.from_pretrained(tmp_path)
    assert model.prompt_ids("a cat") == ([3], [8, 9, 4], [0, 4, 3, 1])
    assert len(model.answer([torch.randn(2, 3, 42, 42)], ["a cat"], 3)) == 1


def test_without_one_it_says_so(tmp_path):
    model = VideoLLM(config()).init_weights(2)
    video = torch.randn(2, 3, 42, 42)
    with pytest.raises(ValueError, match="the tokenizer must come with the checkpoint's folder, got none"):
        model.answer([video], ["a"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer must come with the checkpoint's folder, got none"):
        VideoLLM.from_pretrained(tmp_path).generate(video, "a", 1)


def test_a_damaged_or_foreign_one_is_refused(folder):
    tokenizer([*WORDS, *map(str, range(300))]).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"must fit the vocabulary of 259, got 310 tokens"):
        VideoLLM.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"VideoLLM: the tokenizer in .* cannot be read"):
        VideoLLM.from_pretrained(folder)


def test_code_beside_a_tokenizer_does_not_run(folder, capsys):
    (folder / "evil.py").write_text("print('this must not run')\nclass Evil: pass\n")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    assert VideoLLM.from_pretrained(folder).text.encode("a cat") == [8, 9]
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("template", ["{question}", "{video}", "{video}{video}{question}"])
def test_a_template_holds_both_once(template):
    with pytest.raises(ValueError, match=r"config: template must hold \{video\} and \{question\} once each"):
        replace(preset("tiny"), template=template)


def test_a_question_cannot_move_the_video():
    model = VideoLLM(replace(preset("tiny"), template="a{video}b{question}c"))
    before, after, _ = model.prompt_ids("{video}{question}")
    assert (bytes(before[1:]), bytes(after)) == (b"a", b"b{video}{question}c")
