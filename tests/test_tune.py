"""Tuning, its clock and measurements given: what wins, what is left out, what is written. Only a GPU gives times."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import vkernels as vk
from vkernels.__main__ import main
from vkernels.spec import Shape, all_specs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")

KERNEL = "_apply_rope_kernel"


@pytest.fixture
def spec():
    def make(m):
        q = m.randn(1, 8, 4, 32)
        return {
            "q": q,
            "k": m.randn(1, 8, 2, 32),
            "spec": vk.RopeSpec.build(32),
            "pos": torch.arange(8, device=m.device),
        }

    return replace(next(s for s in all_specs() if s.name == "apply_rope"), shapes=[Shape("toy", make)])


def found(spec, measure, **more):
    from vkernels.triton.tune import tune

    options = {"device": "cpu", "faults": lambda launch, arch, spec, shape: [], "check": False, **more}
    return tune(spec, "sm90", measure=measure, **options)


def by_tiles(launch):
    """The least at BLOCK_S 2, BLOCK_H 16, whatever the order."""
    a = launch.arguments
    return 1.0 + abs(a["BLOCK_S"] - 2) + abs(a["BLOCK_H"] - 16) + (launch.options["num_warps"] == 8)


def test_the_best_candidate_wins(spec):
    (tuned,) = found(spec, by_tiles)
    assert tuned.group == (KERNEL, 32, 0)
    assert tuned.row == {"BLOCK_S": 2, "BLOCK_H": 16, "num_warps": 4, "maxnreg": 160}
    assert tuned.before == {"BLOCK_S": 4, "BLOCK_H": 8, "num_warps": 4, "maxnreg": 160}
    assert (tuned.ms, tuned.before_ms) == (2.0, 22.0)  # forward and backward launch it once each
    assert tuned.tried == 32


def test_a_tie_keeps_what_is_there(spec):
    (tuned,) = found(spec, lambda launch: 1.0 - 0.001 * launch.arguments["BLOCK_S"])
    assert tuned.row == tuned.before


def test_a_candidate_with_a_fault_is_left_out(spec):
    def faults(launch, arch, spec, shape):
        return ["8 bytes of local memory"] if launch.arguments["BLOCK_S"] == 2 else []

    (tuned,) = found(spec, by_tiles, faults=faults)
    assert tuned.row == {"BLOCK_S": 1, "BLOCK_H": 16, "num_warps": 4, "maxnreg": 160}
    assert tuned.tried == 24
    assert len(tuned.left_out) == 8
    assert all("local memory" in why for why in tuned.left_out)


def test_time_that_ends_leaves_the_table_alone(spec):
    clock = iter(range(1000))
    assert found(spec, by_tiles, until=10, clock=lambda: next(clock)) == []


def test_rows_are_written_and_read(spec, tmp_path):
    from vkernels.triton.tiles import home, table
    from vkernels.triton.tune import lines, write

    shutil.copy(home("apply_rope") / "tiles.json", tmp_path)
    tuned = found(spec, by_tiles)
    path = write("apply_rope", "sm90", tuned, tmp_path)
    written = json.loads(path.read_text())[KERNEL]
    assert written["sm90"] == [
        {"d": 32, "BLOCK_S": 2, "BLOCK_H": 16, "num_warps": 4, "maxnreg": 160},
        {"BLOCK_S": 4, "BLOCK_H": 8, "num_warps": 4, "maxnreg": 160},
    ]
    assert {k: v for k, v in written.items() if k != "sm90"} == {
        k: v for k, v in table("apply_rope")[KERNEL].items() if k != "sm90"
    }
    once = path.read_text()
    write("apply_rope", "sm90", tuned, tmp_path)
    assert path.read_text() == once
    assert "11.00x; 32 tried" in next(lines("apply_rope", tuned))


def test_a_winner_that_is_wrong_does_not_win(spec, monkeypatch):
    from vkernels.triton import tune as room

    (tuned,) = found(spec, by_tiles)
    answers = iter([torch.ones(4), torch.full((4,), 1.5)])
    monkeypatch.setattr(room, "_call", lambda *_: [next(answers)])
    monkeypatch.setattr(room, "_noted", lambda *_: ([], {tuned.group}))
    checked = room._checked(spec, tuned, "cpu")
    assert checked.row == tuned.before
    assert "its outputs differ by 5.0e-01" in checked.left_out[-1]
    answers = iter([torch.tensor([1.0, -math.inf]), torch.tensor([1.001, -math.inf])])
    assert room._checked(spec, tuned, "cpu").row == tuned.row


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="tune: needs a CUDA GPU, and torch sees none"):
        main(["tune"])
