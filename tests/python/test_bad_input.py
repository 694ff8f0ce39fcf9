"""What a reference model meets in the wild, kind by kind: every one ends in a sentence, none in a crash or in silence.

Damaged checkpoints, a checkpoint of another model, no frame, one frame, more frames than positions, text longer than
the context, an unknown task. More of each stands beside what it concerns: test_checkpoint, test_reasoner_checkpoint,
test_text, test_generation, test_bt_adapter, test_st_llm, test_tasks.
"""

import json
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("einops")

from vkernels_video.model import TaskModel, VideoLLM, from_preset, preset
from vkernels_video.model.checkpoint import CheckpointError, read
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import training_losses

QUESTION = "what?"
PRESETS = ["tiny", "tiny_bt_llava", "tiny_st_llm_qa", "tiny_st_llm_conversation", "tiny_intp_video_llava"]


def pixels(frames: int) -> torch.Tensor:
    return torch.randn(frames, 3, 42, 42)


# --- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    VideoLLM.from_preset("tiny").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_files_load_whole_or_not_at_all(saved, tmp_path, kind):
    """Sixty files with bytes changed or cut, headers above all: CheckpointError, or every tensor with its shape."""
    good = read(saved)
    file = tmp_path / f"x.{kind}"
    if kind == "bin":
        torch.save(good, file)
    content = file.read_bytes() if kind == "bin" else (saved / "model.safetensors").read_bytes()
    chance, refused = random.Random(0), 0
    for i in range(60):
        bad = bytearray(content)
        if i % 3 == 0:
            del bad[chance.randrange(len(bad)) :]
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(min(len(bad), 4000 if i % 2 else len(content)) or 1)
            if place < len(bad):
                bad[place] = chance.randrange(256)
        file.write_bytes(bad)
        try:
            state = read(file)
        except CheckpointError:
            refused += 1
        else:
            assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert refused >= 20


def test_a_shard_that_is_not_there(saved, tmp_path):
    index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in read(saved)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors cannot be read"):
        VideoLLM.from_pretrained(tmp_path, config="tiny")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="must be an index of shards"):
        VideoLLM.from_pretrained(tmp_path, config="tiny")


@pytest.mark.parametrize("name", ["tiny_bt_llava", "tiny_st_llm_qa", "digits"])
def test_a_preset_that_is_not_the_checkpoints(saved, name):
    with pytest.raises(CheckpointError, match="a vkernels_video checkpoint must fit the model, got "):
        VideoLLM.from_pretrained(saved, config=name)


# --- frames


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_no_frame_one_frame_too_many(name, impl):
    model = VideoLLM.from_preset(name).eval()
    with pytest.raises(ValueError, match="VideoLLM: pixels must hold at least one frame, got 0"):
        model.generate(pixels(0), QUESTION, 2, impl)
    assert len(model.generate(pixels(1), QUESTION, 2, impl).tokens) == 2
    sentence = {
        "tiny_bt_llava": "BTAdapter: frames must be 1 to 8, or even and at most twice that, got 80",
        "tiny_st_llm_qa": "BTAdapter: frames must be 1 to 8, or even and at most twice that, got 80",
    }.get(name)
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            model.generate(pixels(80), QUESTION, 2, impl)
    else:  # global-local takes four of them, INTP scales its positions
        assert len(model.generate(pixels(80), QUESTION, 2, impl).tokens) == 2


def test_more_frames_than_positions_without_scaling():
    model = VideoLLM(preset("tiny").with_options(rope_scaling="none", context=256)).init_weights(0)
    with pytest.raises(ValueError, match=r"prompt and answer must fit the decoder's 256 positions, got 306 \+ 2"):
        model.generate(pixels(30), QUESTION, 2)
    plain = VideoLLM(replace(preset("tiny_st_llm_qa"), branch=None)).init_weights(0)
    rows = plain.visual(plain.features(pixels(70)[None]), text=torch.zeros(1, 2, dtype=torch.int64)).flatten(1, 2)
    with pytest.raises(ValueError, match=r"ST-LLM: video and text must fit the decoder's 256 positions, got 282"):
        training_losses(plain.decoder, plain.mvm, [Example([1], [], [2])], rows, None)


def test_one_unit_is_enough_for_every_task():
    for task in ("online_action_detection", "action_anticipation", "action_segmentation", "highlight_detection"):
        for impl in ("eager", "vkernels"):
            model = TaskModel.from_preset("tiny_videollm_opt", task=task)
            target = torch.rand(2, 1) if task == "highlight_detection" else torch.tensor([[1], [2]])
            loss = model.loss(model(torch.randn(2, 1, 32), impl=impl), target)
            assert bool(loss.isfinite())
            loss.backward()
    with pytest.raises(ValueError, match=r"features must have shape \(b N d\) or \(b N u d\), got \(2, 0, 32\)"):
        from_preset("tiny_videollm_opt")(torch.randn(2, 0, 32))
    with pytest.raises(ValueError, match="Reasoner: tokens must fit the 256 positions, got 257"):
        from_preset("tiny_videollm_opt")(torch.randn(1, 257, 32))


# --- text, names


@pytest.mark.parametrize("name", ["tiny_bt_llava", "tiny_st_llm_qa"])
def test_text_longer_than_the_context(name):
    model = VideoLLM.from_preset(name).eval()
    for question in (QUESTION * 13, QUESTION * 60):
        fits = name == "tiny_bt_llava" and len(question) < 200
        if fits:
            model.answer([pixels(2)], [question], 2)
        else:
            sentence = "must fit the decoder's 256 positions|QFormer: text must have at most 64 tokens"
            with pytest.raises(ValueError, match=sentence):
                model.answer([pixels(2)], [question], 2)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"TaskModel: task must be one of online_action_detection, .*, got 'chess'"):
        TaskModel.from_preset("tiny_videollm_opt", task="chess")
    with pytest.raises(ValueError, match=r"config: size must be one of bt_llava_7b, .*, got huge"):
        from_preset("huge")
    with pytest.raises(ValueError, match="VideoLLM: impl must be one of eager, vkernels, got 'fast'"):
        VideoLLM.from_preset("tiny").generate(pixels(1), QUESTION, 1, "fast")
    with pytest.raises(ValueError, match="TaskModel: impl must be one of eager, vkernels, got 'fast'"):
        from_preset("tiny_videollm_opt")(torch.randn(1, 2, 32), impl="fast")
