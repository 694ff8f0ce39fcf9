"""`python -m vkernels bench` at toy sizes: what it times is right, in turn, and written down; what it cannot time says
why. The times themselves say nothing here.

Trusted after mutation: the float64 check left out, a wrong rival timed all the same, both sides sampled one after the
other, a ratio turned upside down, a reason swallowed, a failure that leaves the exit status 0, loops that did not
divide the sample, and a cold sample that does not empty the cache each turned a test red.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import vkernels as vk
from vkernels.bench import clock, make, measure, runner, select
from vkernels.bench.case import BOTH, Bench, CallEntry, Case, OpEntry
from vkernels.bench.check import Truth, relative_error
from vkernels.bench.cli import Printer, line, summary
from vkernels.bench.clock import WallTimer, last_level_cache, loops_for
from vkernels.bench.machine import environment
from vkernels.bench.measure import METER, Lane, Settings, duel
from vkernels.bench.memory import peak_mb
from vkernels.bench.models import MODELS, model_cases
from vkernels.bench.own import own_cases
from vkernels.bench.problem import Problem
from vkernels.bench.results import Row, Run, load
from vkernels.bench.rivals import REGISTRY, Rival, rivals_of
from vkernels.roofline import Ceiling
from vkernels.spec import OPS, Blank, Cost

CEILING = Ceiling("a machine", 50e9, {"float32": 200e9, "bfloat16": 400e9}, True)
FP32, BF16 = torch.float32, torch.bfloat16
GRID = vk.Grid(3, 2, 2)
TOY = make.attention("toy", 1, 12, (4, 2), 16, lambda: vk.VideoMask.frame_causal(GRID), model="a model")


def toys() -> list[Case]:
    """One of every op, as small as it goes."""
    spec = vk.RopeSpec.build(16)
    moved = vk.rearrangement.from_einops("b s c -> s b c")
    return [
        TOY,
        make.divided("toy", 1, GRID, 2, 16, "spatial", cls=1),
        make.rotation("toy", 5, (4, 2), spec, lambda: torch.arange(5)),
        make.rotation("toy, in place", 5, 2, spec, lambda: torch.arange(5), inplace=True),
        make.prologue("toy", 6, (4, 2), spec, lambda: torch.arange(6), norms=True, bias=True, cache="full"),
        make.prologue("toy, no cache", 6, (4, 2), spec, lambda: torch.arange(6)),
        make.decode("toy", "int4", (4, 2), 64, 200),
        make.decode("toy, full", "full", 2, 16, 20),
        make.append("toy", "int4", 2, 64, 192),
        make.append("toy, full", "full", 2, 16, 20),
        make.move("toy", (2, 3, 8), lambda: moved),
        make.move("toy, norm", (1, 6, 8), lambda: vk.rearrangement.keep(torch.arange(6) % 2 == 0), norm=True),
    ]


def settings(**more) -> Settings:
    return Settings(CEILING, seconds=0.0, **more)


def lanes_of(case: Case, dtype=FP32, direction="forward", names=None) -> list[Lane]:
    entry = OpEntry(case, dtype, direction)
    return [Lane(entry, rival) for rival in entry.rivals if names is None or rival.name in names]


def test_a_run_of_the_command(tmp_path):
    out, own = tmp_path / "run.json", tmp_path / "pytest.json"
    command = [sys.executable, "-m", "vkernels", "bench", "--match=one frame", "--rival=SDPA flash", "--dtype=float32"]
    command += ["--seconds=0.01", "--device=cpu", f"--out={out}", f"--benchmark-json={own}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = load(out)
    (row,) = run.rows
    assert (row.op, row.rival, row.model, row.backend, row.cache) == (
        "attention",
        "SDPA flash",
        "ViT-B/16",
        "cpu",
        "warm",
    )
    assert row.ratio_p20 <= row.ratio <= row.ratio_p80
    assert row.ours_p20_ms <= row.ours_ms <= row.ours_p80_ms
    assert row.rival_p20_ms <= row.rival_ms <= row.rival_p80_ms
    assert row.error < 1e-5
    assert row.rival_error < 1e-5
    assert row.peak_mb > 0.5
    assert row.rival_peak_mb > 0.5
    assert row.flop == 4 * 196 * 196 * 12 * 64
    assert row.gb_per_s == pytest.approx(row.bytes / row.ours_ms / 1e6)
    assert row.tflop_per_s == pytest.approx(row.flop / row.ours_ms / 1e9)
    assert row.roofline_share > 0
    assert line(row) in done.stdout
    assert "one frame, 196 tokens" in done.stdout
    facts = run.environment
    assert {"date", "commit", "machine", "threads", "isa", "copy_gb_per_s", "gflop_per_s", "torch"} <= set(facts)
    (test,) = json.loads(own.read_text())["benchmarks"]
    assert test["stats"]["median"] * 1e3 == pytest.approx(row.ours_ms, rel=0.5)
    assert test["stats"]["rounds"] >= 5
    assert test["extra_info"]["ratio"] == row.ratio


@pytest.mark.parametrize("case", toys(), ids=lambda case: f"{case.op}-{case.id}")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_op_is_checked_and_timed(case, dtype):
    session = runner.Session([], settings(memory=False))
    lanes = [lane for lane in lanes_of(case, dtype) if not lane.rival.compiles]
    for lane in lanes:
        session.run(lane)
    assert not session.failures
    timed = [row for row in session.rows if row.rival_ms is not None]
    assert timed, [row.why for row in session.rows]
    for row in timed:
        assert row.error is not None
        assert row.backend == "cpu"
    for row in session.rows:
        assert row.rival_ms is not None or "CUDA GPU" in row.why or "is not installed" in row.why, row


@pytest.mark.parametrize("case", [TOY, toys()[1], toys()[2], toys()[10]], ids=lambda case: case.op)
def test_backward_is_checked_and_timed(case):
    session = runner.Session([], settings(memory=False))
    for lane in lanes_of(case, direction=BOTH):
        if not lane.rival.compiles:
            session.run(lane)
    assert not session.failures
    assert [row for row in session.rows if row.ratio is not None]
    assert {row.direction for row in session.rows} == {BOTH}
    forward = OpEntry(case, FP32).cost
    assert all(row.flop >= 2 * forward.flop and row.bytes > forward.bytes for row in session.rows)


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    """A planted kernel that is 3 % off, through pytest: no row, exit status 1, one sentence."""
    right = Problem.ours

    def planted(self, backend=None):
        call = right(self, backend)
        return call if backend == "reference" else lambda: call() * 1.03

    monkeypatch.setattr(Problem, "ours", planted)
    session = runner.Session(lanes_of(TOY, names=("SDPA flash, dense mask", "SDPA math, dense mask")), settings())
    assert runner.run(session) == 1
    assert session.rows == []
    assert session.failures == [
        "toy, torch.float32, forward: our result differs from float64 by 3.0e-02 of the largest value"
    ]
    monkeypatch.undo()
    session = runner.Session(session.lanes, settings())
    assert runner.run(session) == 0
    assert len(session.rows) == 2


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = Problem.ours

    def planted(self, backend=None):
        call = right(self, backend)
        return call if backend == "reference" else lambda: _Twice.apply(call())

    monkeypatch.setattr(Problem, "ours", planted)
    with pytest.raises(AssertionError, match=r"differs from float64 by 1\.0e"):
        OpEntry(TOY, FP32, BOTH).build()


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_rival_that_is_wrong_or_broken_says_so():
    def broken(problem):
        raise RuntimeError("it has no kernel for 16\nand a long trace")

    own = {"wrong": lambda problem: lambda: problem.kwargs["q"], "broken": broken, "mute": lambda problem: None}
    session = runner.Session([], settings())
    for lane in lanes_of(replace(TOY, rivals=own), names=own):
        session.run(lane)
    assert [(row.rival, row.ratio, row.rival_ms) for row in session.rows] == [
        ("wrong", None, None), ("broken", None, None),
    ]  # fmt: skip
    assert "differs from float64" in session.rows[0].why
    assert session.rows[1].why == "RuntimeError: it has no kernel for 16"
    printer = Printer(Run({}, session.rows), None)
    for row in session.rows:
        printer(row)
    assert "could not run: attention broken: RuntimeError: it has no kernel for 16" in printer.excuses()
    assert not session.failures


def test_sides_take_turns():
    order: list[str] = []
    ours, theirs = duel(lambda: order.append("o"), lambda: order.append("r"), settings(cold=True))
    assert order == ["r", "o"] * (len(order) // 2)
    assert len(ours) == len(theirs) >= 5


def test_slow_sides_are_run_no_oftener_than_it_takes(monkeypatch):
    """Once to warm up and to see that one call fills a sample, then three rounds."""
    monkeypatch.setattr(clock, "SLOW_CALL_S", 0.0)
    monkeypatch.setattr(measure, "SLOW_S", 0.0)
    order: list[str] = []
    monkeypatch.setattr(clock, "MIN_SAMPLE_S", 0.0)
    ours, theirs = duel(lambda: order.append("o"), lambda: order.append("r"), settings())
    assert order == ["r", "o"] * 4
    assert len(ours) == len(theirs) == 3


class Scripted:
    """A clock that tells what it is told."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def sample(self, call, loops=1, cold=False):
        self.asked.append((call(), loops, cold))
        return self.seconds[call()]


def test_a_ratio_is_theirs_over_ours():
    lane = Lane(CallEntry(Bench("x", "y", FP32, lambda: "o", {"r": lambda: "r"}, Cost(8e6, 4e6), compare=False)), None)
    lane.rival = lane.entry.rivals[0]
    chosen = settings(memory=False, cold=True)
    chosen.timer = Scripted(o=0.001, r=0.004)
    before = METER.total
    row = lane.measure(lane.entry.build(), chosen)
    assert (row.ours_ms, row.rival_ms, row.ratio) == (1.0, 4.0, 4.0)
    assert (row.gb_per_s, row.tflop_per_s) == (4.0, 0.008)
    assert row.roofline_share == pytest.approx(0.08)
    assert METER.total - before == pytest.approx(0.001 * 6)
    assert {cold for _, _, cold in chosen.timer.asked} == {True}
    assert row.cache == "cold"


def test_samples(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))
    calls: list[int] = []
    assert WallTimer().sample(partial(calls.append, 1), loops=4) == 0.25
    assert len(calls) == 4
    monkeypatch.undo()
    monkeypatch.setattr(clock, "last_level_cache", lambda: 1 << 10)
    timer = WallTimer()
    for turn in (1, 2):
        timer.sample(lambda: None, cold=True)
        assert timer._trash.numel() == 4 << 10
        assert bool((timer._trash == turn).all())
    assert loops_for(WallTimer(), lambda: None) == 1000
    assert last_level_cache() >= 1 << 18


def test_memory_is_the_peak_of_a_call():
    assert peak_mb(lambda: torch.ones(1_000_000) + torch.ones(1_000_000)) == pytest.approx(12.0, rel=0.01)


def test_own_cases_name_rivals_that_exist():
    names = {name for op in [*OPS, "lower_mask"] for name in [r.name for r in rivals_of(op)]}
    for case in own_cases():
        known = {rival.name for rival in rivals_of(case.op)} | set(case.rivals)
        assert set(case.quick.values()) <= known, case.id
        for beginning, dtype in case.targets:
            assert dtype in case.dtypes
            assert any(name.startswith(beginning) for name in known), (case.id, beginning)
    assert names == set(REGISTRY)
    quick = select.quick_lanes("cpu")
    assert len(quick) == sum(len(case.quick) for case in own_cases())
    assert {lane.entry.op for lane in quick} >= set(OPS) - {"lower_mask"}
    assert not [lane for lane in quick if lane.rival.compiles or lane.rival.gpu]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_calls_we_serve(name):
    for frames in (8, 64):
        for case in model_cases(name, frames):
            assert (case.frames, case.model) == (frames, MODELS[name].label)
            cost = Problem(case.op, case.make(Blank(BF16))).cost()
            assert cost.bytes > 0, case.id
    assert len({(case.op, case.id) for case in model_cases(name, 64)}) == len(model_cases(name, 64))


def test_what_is_too_much_is_left_out_in_a_sentence(monkeypatch):
    choice = select.Choice(models=["video_llava"], frames=[64])
    kept = select.lanes(choice, CEILING)
    assert "prefill of 16,448 tokens" in " ".join(choice.left_out)
    assert not [lane for lane in kept if "prefill" in lane.entry.id]
    assert [lane for lane in kept if "time" in lane.entry.id]
    everything = select.Choice(models=["video_llava"], frames=[64], everything=True)
    assert [lane for lane in select.lanes(everything, CEILING) if "prefill" in lane.entry.id]
    large = select.Choice(ops=["rearrange"], match="st_llm_keep_norm")
    assert select.lanes(large, CEILING) == []
    assert "its arguments are 741 MB, a GPU's size" in large.left_out[0]
    monkeypatch.setattr("vkernels.bench.case.memory_left", lambda device: 1e3)
    assert "it needs about 0 GB" in OpEntry(TOY, FP32).too_much(CEILING)


def test_time_that_is_over_is_said():
    session = runner.Session([], settings(until=0.0))
    assert session.run(lanes_of(TOY)[0]) is None
    assert session.left_out == ["attention, toy, against SDPA flash: no time was left"]


def test_families_of_other_packages(monkeypatch):
    """None, one that cannot be loaded, and one that is measured."""
    said: list[str] = []
    monkeypatch.setattr(select, "entry_points", lambda group: [])
    assert select.brought_along(said.append) == []
    assert said[0].startswith("no package brings a family along")
    bench = Bench("theirs", "integrations", FP32, lambda: torch.ones(3), {"stock": lambda: torch.ones(3)}, Cost(1, 1))

    class Point:
        def __init__(self, name, made):
            self.name, self.made = name, made

        def load(self):
            if isinstance(self.made, Exception):
                raise self.made
            return lambda: self.made

    points = [Point("broken", ModuleNotFoundError("No module named 'transformers'")), Point("good", [bench])]
    monkeypatch.setattr(select, "entry_points", lambda group: points)
    choice = select.Choice(ops=["integrations"])
    lanes = select.lanes(choice, CEILING, said.append)
    assert said[-1] == "broken: not measured: ModuleNotFoundError: No module named 'transformers'"
    session = runner.Session(lanes, settings())
    session.run(lanes[0])
    assert [(row.id, row.rival, row.why) for row in session.rows] == [("theirs", "stock", None)]
    wrong = Lane(CallEntry(replace(bench, ours=lambda: torch.zeros(3))), lanes[0].rival)
    with pytest.raises(AssertionError, match=r"differs from stock by 1\.0e"):
        session.run(wrong)
    assert len(session.failures) == 1


def test_without_pytest_benchmark_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    from vkernels.bench import cli

    assert cli.main(["--device=cpu"]) == 2
    assert "needs pytest and pytest_benchmark: pip install vkernels[bench]" in capsys.readouterr().err


def test_losses_are_named(capsys, tmp_path):
    win = Row(
        id="a", op="x", dtype="float32", rival="r", ours_ms=1.0, rival_ms=2.0, ratio=2.0, ratio_p20=1.9, ratio_p80=2.1
    )
    loss = replace(win, id="b", ratio=0.5, ratio_p20=0.4, ratio_p80=0.6, target=1.0)
    assert (
        summary([win, loss]) == "1 of 2 faster than what they are against; slower: x b float32; * 1 under their target"
    )
    assert summary([]) == "nothing was measured"
    run = Run({}, [win])
    printer = Printer(run, tmp_path / "run.json")
    printer(win)
    assert load(tmp_path / "run.json") == run  # what is killed now has been kept
    run.rows.append(loss)
    printer(loss)
    assert load(tmp_path / "run.json").rows == [win, loss]
    assert capsys.readouterr().out.count("\nx\n") == 1
    assert line(loss).endswith("*")


def test_the_truth_is_of_the_first_head_and_in_float64():
    entry = OpEntry(TOY, BF16)
    problem = entry.made(BF16)
    truth = Truth(problem, False, "cpu", entry.made)
    assert [(x.dtype, tuple(x.shape)) for x in truth.want] == [(torch.float64, (1, 12, 1, 16))]
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_the_environment_names_what_was_measured_on():
    facts = environment(CEILING)
    assert facts["copy_gb_per_s"] == 50.0
    assert facts["gflop_per_s"] == {"float32": 200.0, "bfloat16": 400.0}
    assert facts["threads"] == torch.get_num_threads()


def test_rivals_are_told_apart():
    assert {"SDPA flash", "xformers", "flash-attn", "FlexAttention, compiled"} <= {
        r.name for r in rivals_of("attention")
    }
    assert {"Hugging Face eager", "liger-kernel"} <= {r.name for r in rivals_of("apply_rope")}
    assert all(isinstance(rival, Rival) and rival.ops for rival in REGISTRY.values())


def test_the_examples_of_the_page_work():
    page = (Path(__file__).parent.parent / "docs" / "benchmarking.md").read_text()
    names: dict = {}
    for block in re.findall(r"(?s)```python\n(.*?)```", page):
        exec(block, names)
    moved = make.move("toy", (1, 6, 8), lambda: vk.rearrangement.keep(torch.arange(6) % 2 == 0))
    session = runner.Session([], settings())
    try:
        session.run(lanes_of(moved, names=("index_select",))[0])
    finally:
        del REGISTRY["index_select"]
    assert session.rows[0].ratio is not None
