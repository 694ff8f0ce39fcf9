"""The stages `make bench-model` measures: the two sides agree, and what is stored becomes the README's table."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("einops")

from vkernels_video.bench.model import CASES, Case, branch, measured

from benchmarks.readme import model_numbers
from vkernels.bench.results import Run, store


def test_a_stage_is_measured_and_shown(tmp_path):
    stage = measured(Case("branch, tiny", torch.float32, branch(1, 2, 0.1), target=1000.0), seconds=0.0)
    assert stage.ratio_p20 <= stage.ratio <= stage.ratio_p80
    assert stage.ours_mb > 0
    file = tmp_path / "model.json"
    assert model_numbers(file).startswith("**Not measured yet.**")
    facts = {"date": "a day", "machine": "a machine", "threads": 2, "commit": "abc"}
    store(Run(facts, stages=[stage, replace(stage, target=None)]), file)
    lines = model_numbers(file).splitlines()
    assert "a day on a machine, 2 threads, commit abc" in lines[0]
    assert "1000.0x missed" in lines[-2]
    assert "missed" not in lines[-1]


def test_a_side_that_differs_is_not_timed():
    sides = {"eager": torch.ones(3), "vkernels": torch.full((3,), 1.1)}
    with pytest.raises(AssertionError, match="the sides differ by"):
        measured(Case("wrong", torch.float32, lambda dtype: sides.__getitem__), seconds=0.0)


def test_cases_have_names_of_their_own():
    assert len({(case.id, case.dtype) for case in CASES}) == len(CASES)
