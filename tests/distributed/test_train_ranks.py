"""The trainer on two gloo processes does what it does in one with the films of both.

Planted bugs that turn these red: both ranks take the first films; a mask drawn for a rank's own films; gradients that
are not shared; contrasts whose gradient counts once; a loss of one rank in the curve; every rank writes.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch

for module in ("transformers", "einops", "sklearn", "matplotlib", "rich", "torch.distributed"):
    pytest.importorskip(module)

import train_work as work  # noqa: E402
from vkernels_video.train import Run  # noqa: E402

JOBS = {
    "st_llm": {"frames": 4, "mask": True, "mvm": True},
    "branch": {},
    "heads": {"frames": 5},
}


@pytest.mark.parametrize("what", JOBS)
def test_two_ranks_are_one_process_with_the_films_of_both(ranks, what):
    alone = partial(work.trained, what, size=6, **JOBS[what])
    losses, grads = alone()
    for found, own in ranks(2).run(alone):
        assert np.linalg.norm(own - grads) <= 1e-4 * np.linalg.norm(grads)
        for got, expected in zip(found, losses, strict=True):
            assert got == pytest.approx(expected, rel=1e-3)


def test_films_must_go_round(ranks):
    said = ranks(2).refused(partial(work.trained, "heads", size=3, frames=5))
    assert all("train: size must be a multiple of the 2 ranks, got 3" in each for each in said)


def test_the_command_under_torchrun(ranks, tmp_path):
    """Rank 0 alone writes, and what it writes is a run of one process, which can go on from it."""
    ranks(2)
    command = ["--what", "heads", "--steps", "2", "--size", "4", "--sight", "0", "--films", "4"]
    assert work.torchrun(tmp_path, *command) == [0, 0]
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]
    assert json.loads((tmp_path / "0" / "result.json").read_text())["steps"] == 2
    again = Run.resume(tmp_path / "0")
    alone = Run(again.recipe)
    for _ in range(2):
        alone.advance()
    torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(alone.losses), rtol=1e-4, atol=1e-4)
