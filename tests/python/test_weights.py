"""The weights that ship: the strict audit lets them in, they answer held-out films, and their files tell the truth."""

import json
import shutil

import pytest
import torch

for module in ("transformers", "einops", "sklearn"):
    pytest.importorskip(module)

from safetensors.torch import load_file, save_file  # noqa: E402
from vkernels_video import demo  # noqa: E402
from vkernels_video.digits import QUESTIONS, Studio, batch  # noqa: E402
from vkernels_video.model import VideoLLM, preset  # noqa: E402
from vkernels_video.model.checkpoint import CheckpointError  # noqa: E402
from vkernels_video.quiz import ask, shipped  # noqa: E402
from vkernels_video.train import accuracy, answers  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return VideoLLM.from_pretrained(shipped())


def test_nine_of_ten_held_out_questions_are_answered(model):
    found = accuracy(model, films=320, seed=11)
    assert found["all"]["share"] > 0.9
    assert all(found[kind]["share"] > 0.8 for kind in QUESTIONS), found


def test_implementations_answer_alike(model):
    _, films = batch(Studio(12, "test"), 32)
    assert answers(model, films, "eager") == answers(model, films, "vkernels")


def test_the_demo_is_answered_rightly_by_free_generation(model):
    asked = ask(model, demo.QUIZ_SEED)
    assert len(asked) == len(QUESTIONS)
    assert [each.answer for each in asked] == [each.truth for each in asked]
    assert asked == ask(model, demo.QUIZ_SEED, "eager")
    assert demo.digits_quiz()["asked"][0]["question"] == asked[0].question


def test_files_tell_what_they_are(model):
    story = json.loads((shipped() / "recipe.json").read_text())
    assert story["recipe"]["preset"] == "digits"
    assert model.config == preset("digits")
    assert story["accuracy"]["all"]["share"] > 0.9
    assert sum(file.stat().st_size for file in shipped().iterdir()) <= 8e6
    weights = load_file(shipped() / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_a_missing_tensor_is_refused(tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(shipped(), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("decoder.norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.norm\.weight"):
        VideoLLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="name must be digits, got 'letters'"):
        shipped("letters")
