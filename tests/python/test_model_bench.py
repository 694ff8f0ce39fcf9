"""The stages `make bench-model` measures: the two sides agree, and what is stored becomes the README's table."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("einops")

from benchmarks.model import CASES, Case, branch, measured
from benchmarks.readme import model_numbers


def test_a_stage_is_measured_and_shown(tmp_path):
    row = measured(Case("branch, tiny", torch.float32, branch(1, 2, 0.1), target=1000.0), seconds=0.0)
    assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
    assert row["error"] <= 1e-4
    assert row["ours_peak"] > 0
    file = tmp_path / "model.json"
    assert model_numbers(file).startswith("**Not measured yet.**")
    facts = {"date": "a day", "machine": "a machine", "threads": 2, "commit": "abc"}
    file.write_text(json.dumps({"environment": facts, "rows": [row, row | {"target": None}]}))
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
