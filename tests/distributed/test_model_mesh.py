"""The reference model on 2, 3 and 4 gloo processes: what one process computes, answers and training steps.

Planted bugs that turn these red: the last token's state from another rank; positions that are not dealt; gathered rows
left in the order of the ranks; clips in another order, or another rank's; a new token in every cache, in none, twice,
or in another rank's; caches as long as one process's, or one token too short; a prompt's lengths where a rank's own
belong; a rank without clips that runs nothing; embeddings' gradients whole on every rank; gradients not summed over the
ranks; partial attentions not merged; frames not agreed on; the eager side let through; a deal of inference tensors.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch.distributed")
import model_work as work

MODELS = ["tiny", "tiny_bt_llava", "tiny_st_llm_qa", "tiny_st_llm_conversation", "digits"]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_one_process(ranks, name):
    """Odd numbers of tokens, more ranks than clips, and frames that the ranks do not divide."""
    for world in (2, 3, 4):
        assert max(ranks(4).run(work.generated, world, name, 6 if "bt" in name else 7, 5)) < 1e-4


def test_what_is_sent_is_what_the_page_says(ranks):
    for world in (2, 3, 4):
        assert all(ranks(4).run(work.counted, world))


def test_a_token_is_kept_once(ranks):
    for world in (2, 3, 4):
        assert all(ranks(4).run(work.kept, world))


@pytest.mark.parametrize("scheme", ["int4", "int2"])
def test_codes_are_merged_as_they_were_cut(ranks, scheme):
    for world in (2, 3):
        for from_cut, from_whole in ranks(4).run(work.quantised, world, scheme):
            assert from_cut < 1e-3 < from_whole


@pytest.mark.parametrize(
    ("name", "frames", "masked"), [("tiny", 7, False), ("tiny_st_llm_qa", 8, True), ("digits", 5, True)]
)
def test_losses_and_gradients_are_those_of_one_process(ranks, name, frames, masked):
    for world in (2, 3, 4):
        assert max(ranks(4).run(work.trained, world, name, frames, masked)) < 1e-4


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_it_trains_in_the_engines_people_run(ranks, kind):
    assert max(ranks(4).run(work.engine, kind)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 0, "num_return_sequences": 2}])
def test_batches_beams_and_samples(ranks, options):
    assert all(ranks(4).run(partial(work.answered, **options), 3))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("mesh", "VideoLLM: mesh must be a one-dimensional DeviceMesh"),
        ("task", "from_preset: mesh must be None for a TaskModel, got"),
        ("impl", "VideoLLM: impl must be vkernels on a mesh, got 'eager'"),
        ("seed", "VideoLLM: seed must be given to sample on a mesh"),
        ("stream", "VideoLLM: mesh must be None to stream"),
        ("frames", "gather_tokens: arguments must agree on every rank"),
    ],
)
def test_refusals(ranks, kind, sentence):
    assert all(sentence in said for said in ranks(4).refused(work.refused, kind))


def test_the_example_under_torchrun():
    """384 frames are for people; 24 are odd enough for two ranks."""
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = ["examples/long_video_torchrun.py", "--frames", "24", "--tokens", "4", "--check"]
    paths = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*launch, *example],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert "24 frames, 268 tokens on 2 ranks" in run.stdout
    assert "the same on every rank" in run.stdout
    assert "the same, by one process" in run.stdout
