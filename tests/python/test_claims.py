"""The experiments' arithmetic and page, and one experiment run at toy size.

Tried against planted bugs: intervals of unpaired draws, a verdict with its sign turned, a record that replaces those of
other seeds, a page that leaves out what was not run, clips put back in the order they were encoded in.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

for module in ("transformers", "einops", "sklearn", "scipy"):
    pytest.importorskip(module)

from vkernels_video.claims import __main__ as command  # noqa: E402
from vkernels_video.claims import experiment, frames, page, statistics, stream  # noqa: E402
from vkernels_video.claims.statistics import Estimate  # noqa: E402
from vkernels_video.model import VideoLLM  # noqa: E402


def test_a_share_and_its_interval():
    hits = np.random.default_rng(3).random((3, 400)) < 0.8
    of = statistics.share(hits)
    assert of.value == hits.mean()
    assert of.low < of.value < of.high
    # Of 1,200 independent answers: 1.96 sqrt(0.8 0.2 / 1200) = 0.023 to either side; few seeds make it wider.
    assert 0.04 < of.high - of.low < 0.08


def test_differences_are_paired():
    """One answer in fifty differs: far less than two unpaired shares of a half would."""
    a = np.random.default_rng(0).random((3, 500)) < 0.5
    b = a.copy()
    b[:, ::50] = False
    of = statistics.difference(a, b)
    assert 0 < of.low < of.value < of.high < 0.05
    assert statistics.difference(b, a).value == -of.value


def test_ratios_are_medians_of_pairs():
    of = statistics.ratio([2.0, 4.0, 60.0], [1.0, 2.0, 10.0])
    assert of.value == 2.0
    assert of.high == 6.0


def test_verdicts():
    assert statistics.more(Estimate(0.2, 0.1, 0.3)) == "holds"
    assert statistics.more(Estimate(-0.2, -0.3, -0.1)) == "does not hold"
    assert "undecided" in statistics.more(Estimate(0.1, -0.1, 0.3))
    assert statistics.as_much(Estimate(0.0, -0.02, 0.02), 0.03) == "holds"
    assert statistics.as_much(Estimate(-0.1, -0.12, -0.05), 0.03) == "does not hold"
    assert "undecided" in statistics.as_much(Estimate(-0.01, -0.05, 0.03), 0.03)
    for of, most, least in (
        (Estimate(0.9, 0.8, 1.0), "holds", "does not hold"),
        (Estimate(1.4, 1.3, 1.5), "does not hold", "holds"),
        (Estimate(1.1, 0.9, 1.3), "undecided: the interval contains 1.1", "undecided: the interval contains 1.1"),
    ):
        assert (statistics.at_most(of, 1.1), statistics.at_least(of, 1.1)) == (most, least)


def test_what_was_not_run_is_said():
    text = page.write(command.CLAIMS, {})
    assert text.count("**Not run yet.**") == len(command.CLAIMS)
    assert not re.search(r"\d%", text.split("## 1.")[1])


def test_concatenated_clips_come_back_in_order(monkeypatch):
    """With an encoder that passes frames through, both orders give the frames in the order of time."""
    model = VideoLLM(frames.CONFIG)
    seen = []

    def clips(pixels, impl):
        seen.append(pixels[:, :, 0, 0, 0].tolist())
        return pixels[:, :, 0, :, 0][:, :, :, None]

    monkeypatch.setattr(model.encoder, "forward", clips)
    monkeypatch.setattr(model, "visual", lambda features: features)
    film = torch.arange(16.0)[:, None, None, None].expand(16, 3, 24, 24)
    for order, first in (("interleaved", list(range(0, 16, 2))), ("concatenated", list(range(8)))):
        rows = frames._rows(model, film[None], order)
        assert rows[0, :, 0, 0].tolist() == list(range(16))
        assert seen.pop()[0] == first


def test_seeds_are_kept_and_the_page_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "SIGHT", 2)
    monkeypatch.setattr(stream, "RECIPE", replace(stream.RECIPE, steps=2, size=2))
    monkeypatch.setattr(stream, "FILMS", 4)
    experiment.eyes.cache_clear()
    for seed in ("0", "1"):
        assert command.main(["--only", "stream", "--seeds", seed, "--docs", str(tmp_path)]) == 0
    experiment.eyes.cache_clear()
    kept = json.loads((tmp_path / "claims" / "stream.json").read_text())
    assert sorted(kept["seeds"]) == ["0", "1"]
    assert all(one["apart"] < 1e-4 for one in kept["seeds"].values())
    text = (tmp_path / "claims.md").read_text()
    assert "Live decoding equals full recomputation" in text
    assert "--only stream --seeds 0 1" in text
    command.main(["--only", "stream", "--seeds", "0", "1", "--missing", "--docs", str(tmp_path)])
    assert json.loads((tmp_path / "claims" / "stream.json").read_text()) == kept


def test_the_page_in_the_documents_is_what_the_records_say():
    docs = command.Path(__file__).resolve().parents[2] / "docs"
    kept = {claim.name: command.read(docs / "claims", claim.name) for claim in command.CLAIMS}
    assert (docs / "claims.md").read_text() == page.write(command.CLAIMS, kept)


def test_a_cached_question_is_answered_as_a_whole_one():
    """In full precision the answer read against the cache is that of one pass over film and question."""
    model = VideoLLM(replace(frames.CONFIG)).init_weights(3).eval()
    studio = frames.Studio(4, "test", 16, frames.KINDS, 4)
    films = [studio.film() for _ in range(6)]
    whole = frames._answers(model, films, "ntk", "interleaved")
    # Bases differ by the length they are made for (the longest question of a batch), so one at a time.
    whole = [frames._answers(model, [film], "ntk", "interleaved")[0] for film in films]
    assert [frames._cached(model, film, "none")[0] for film in films] == whole
