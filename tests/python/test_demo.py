"""`python -m vkernels_video.demo`, end to end in tiny: what it prints, writes, refuses, and how it exits."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

for package in ("av", "einops", "rich", "transformers"):
    pytest.importorskip(package)

from test_video import write_clip  # noqa: E402
from vkernels_video import demo, measure  # noqa: E402
from vkernels_video.model import VideoLLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clip(tmp_path):
    return str(write_clip(tmp_path / "clip.mkv", range(0, 240, 20)))


@pytest.fixture
def tiny(clip, tmp_path):
    return [clip, "--size", "tiny", "--frames", "6", "--tokens", "5", "--out", str(tmp_path / "report")]


def test_prints_every_stage_and_writes_the_report(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert demo.main(tiny) == 0
    said = capsys.readouterr().out
    for words in (
        "read clip",
        "preprocess",
        "encoder",
        "connector",
        "prefill",
        "decode 1 token",
        "speed-up",
        "peak memory",
        "which digit goes",
    ):
        assert words in said
    assert re.search(r"the same tokens .*largest logit difference\s+\d\.\de-\d\d", said, re.S)
    assert "tokens mean nothing" in " ".join(said.split())
    assert "how many digits" in (tmp_path / "report" / "index.html").read_text()


def test_json_is_all_of_stdout(tiny):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "python")]))
    command = [sys.executable, "-m", "vkernels_video.demo", *tiny, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [stage["name"] for stage in results["stages"]] == ["video", "preprocess", *demo.STAGES]
    assert results["tokens"]["eager"] == results["tokens"]["vkernels"]
    assert len(results["tokens"]["eager"]) == 5
    assert results["prompt"]["length"] == 1 + 6 * 10 + len(demo.QUESTION)
    assert results["agreement"]["largest_logit_difference"] < 1e-3 * results["agreement"]["logit_spread"]
    assert all(min(stage["seconds"].values()) > 0 for stage in results["stages"])
    assert results["stages"][2]["peak_bytes"]["eager"] > 0


class Loads(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "data", "poster", "srcset") and v]
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.found.append(tag)


def test_report_is_self_contained(tiny, tmp_path):
    assert demo.main(tiny) == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    parser = Loads()
    parser.feed(page)
    assert len(parser.found) == 6
    assert all(found.startswith("data:image/jpeg;base64,") for found in parser.found)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", page)
    assert page.count("<svg") == 3
    assert "prefers-color-scheme:dark" in page
    assert "tokens mean nothing" in page
    for words in ("Prefill", "Where the time goes", "Who sees whom", "torch 2", "random, seed 0"):
        assert words in page


def test_hostile_names_stay_text(tmp_path, capsys):
    path = write_clip(tmp_path / "<img src=x onerror=alert(1)>.mkv", range(0, 60, 10))
    assert demo.main([str(path), "--size", "tiny", "--frames", "2", "--tokens", "2", "--out", str(tmp_path)]) == 0
    assert "<img src=x" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_same_seed_same_tokens(tiny, capsys):
    tokens = []
    for seed in ("3", "3", "4"):
        assert demo.main([*tiny, "--json", "--seed", seed]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"]["vkernels"])
    assert tokens[0] == tokens[1] != tokens[2]


def test_disagreement_is_a_failure(tiny, capsys, monkeypatch):
    generate = VideoLLM.generate

    def wrong(self, pixels, question, tokens, impl, *stage):
        right = generate(self, pixels, question, tokens, impl, *stage)
        return right if impl == "eager" else dataclasses.replace(right, tokens=[right.tokens[0] ^ 1, *right.tokens[1:]])

    monkeypatch.setattr(VideoLLM, "generate", wrong)
    assert demo.main(tiny) == 1
    assert "demo: the sides must generate the same tokens, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.mp4"], "video: clip must be a file that exists, got missing.mp4"),
        (["--frames", "0"], "demo: --frames must be at least 1, got 0"),
        (["--frames", "5000"], "demo: --frames must be at most 1024, got 5000"),
        (["--tokens", "-1"], "demo: --tokens must be at least 1, got -1"),
        (["--size", "huge"], "demo: --size must be one of tiny, small, got huge"),
        (["--out", __file__], "demo: --out must be a folder, got the file"),
    ],
)
def test_refusals(arguments, sentence, capsys):
    assert demo.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_memory_probe_sees_temporaries():
    """A megabyte that lives only inside the stage counts; what was there before does not."""
    before = torch.zeros(1_000_000)
    probe = measure.MemoryProbe()
    with probe("stage"):
        (before[:250_000] + 1).sum()
    assert 1_000_000 <= probe.peak["stage"] < 1_100_000


def test_sides_take_turns():
    order = []

    def run(name, stage):
        order.append(name)
        with stage("encoder"):
            pass

    sides = {name: lambda stage, name=name: run(name, stage) for name in "ab"}
    results = measure.alternate(sides, repeats=3, deadline=float("inf"))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert len(results["a"].runs["encoder"]) == 3
    order.clear()
    results = measure.alternate(sides, repeats=3, deadline=0)
    assert "".join(order) == "ab" + "ab"
