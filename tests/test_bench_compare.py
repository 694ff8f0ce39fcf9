"""`python -m vkernels bench compare`: which rows lost speed between two runs, and what does not compare.

Trusted after mutation: a loss judged without the spread, one judged without the threshold, the best row first, times of
two machines compared, and an exit status of 0 with a slower row each turned a test red.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from vkernels.bench.compare import main
from vkernels.bench.results import Row, Run, Stage, store

HERE = {"machine": "a CPU", "threads": 2, "isa": "avx512", "torch": "2.13.0", "commit": "1111111"}
ROW = Row(
    id="joint", op="attention", dtype="float32", rival="SDPA", backend="cpu",
    ours_ms=10.0, ours_p20_ms=9.8, ours_p80_ms=10.2, rival_ms=20.0, ratio=2.0, ratio_p20=1.95, ratio_p80=2.05,
)  # fmt: skip


def ratio(value: float, spread: float = 0.01, **changes) -> Row:
    return replace(ROW, ratio=value, ratio_p20=value * (1 - spread), ratio_p80=value * (1 + spread), **changes)


@pytest.fixture
def compared(tmp_path, capsys):
    def run(before: list, after: list, *flags: str, there: dict | None = None) -> tuple[int, str, str]:
        paths = []
        for name, rows, facts in (("a", before, HERE), ("b", after, {**HERE, "commit": "2222222", **(there or {})})):
            stages = [row for row in rows if isinstance(row, Stage)]
            run = Run(facts, [row for row in rows if isinstance(row, Row)], [], stages)
            paths.append(str(store(run, tmp_path / f"{name}.json")))
        status = main([*paths, *flags])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("after", "flags", "status"),
    [
        (ratio(2.0), (), 0),
        (ratio(1.8), (), 1),  # a tenth lost, spreads apart
        (ratio(1.8, spread=0.2), (), 0),  # a tenth lost inside the spread
        (ratio(1.92), (), 0),  # 4 % lost: less than 5 %
        (ratio(1.92), ("--fail-over", "3%"), 1),
        (ratio(1.92), ("--fail-over", "0.03"), 1),
        (ratio(3.0), (), 0),
    ],
)
def test_slower_is_beyond_the_threshold_and_beyond_the_spread(compared, after, flags, status):
    assert compared([ratio(2.0)], [after], *flags)[0] == status


def test_the_worst_row_comes_first_and_is_named(compared):
    names = ("fine", "worse", "worst")
    before = [ratio(2.0, id=name) for name in names]
    after = [ratio(2.1, id="fine"), ratio(1.5, id="worse", backend="reference"), ratio(1.0, id="worst", ours_ms=21.0)]
    status, out, _ = compared(before, after)
    rows = [line for line in out.splitlines() if "attention:" in line]
    assert status == 1
    assert [next(name for name in names if f": {name} " in line) for line in rows] == ["worst", "worse", "fine"]
    assert rows[0].startswith("SLOWER   -50.0%        2x        1x   +110.0%")
    assert "backend cpu, then reference" in rows[1]
    assert "3 rows compared, 2 slower" in out


def test_new_gone_and_incomparable_rows_are_listed(compared):
    before = [ROW, ratio(2.0, id="old"), ratio(2.0, id="x", dtype="float16"), replace(ROW, id="r", rival="flash")]
    failed = replace(ROW, id="r", rival="flash", ratio=None, rival_ms=None, why="not installed")
    after = [ROW, ratio(2.0, id="young"), ratio(2.0, id="x", dtype="bfloat16"), failed]
    status, out, _ = compared(before, after, "--ratios")
    assert status == 0
    assert "new: attention: young [float32] against SDPA" in out
    assert "gone: attention: old [float32] against SDPA" in out
    assert "not compared: attention: x [float16] against SDPA: another dtype in the other run" in out
    assert "not compared: attention: r [float32] against flash: no ratio in both runs (not installed)" in out


def test_a_row_without_a_rival_is_held_by_its_time(compared):
    alone = replace(ROW, ratio=None, rival_ms=None, why="too slow")
    slow = replace(alone, ours_ms=12.0, ours_p20_ms=11.9, ours_p80_ms=12.1)
    assert compared([alone], [alone])[0] == 0
    assert compared([alone], [slow])[0] == 1


def test_times_of_two_machines_are_refused_and_ratios_compared(compared):
    there = {"machine": "another CPU", "torch": "2.14.0"}
    status, _, sentence = compared([ratio(2.0)], [ratio(1.0)], there=there)
    assert status == 2
    assert "bench compare: times must be of one machine, got machine a CPU against another CPU; --ratios" in sentence
    status, out, _ = compared([ratio(2.0)], [ratio(1.0, ours_ms=1.0)], "--ratios", there=there)
    assert status == 1
    assert "note: torch 2.13.0 against 2.14.0: the rivals may have changed" in out
    assert "-90.0%" not in out, "a time of another machine was compared"


def test_stages_are_rows_too(compared):
    stage = Stage("prefill", "float32", 6.0, 3.0, 2.0, 1.99, 2.01)
    assert compared([stage], [stage])[0] == 0
    assert compared([stage], [replace(stage, ratio=1.5, ratio_p20=1.49, ratio_p80=1.51)])[0] == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "must be a file that can be read, got No such file"),
        (b"\xff\xfe\x00", "must be JSON, got bytes that are no text"),
        (b"{", "must be JSON, got"),
        (b"[]", "must be a benchmark run of format 1"),
        (b'{"format": 1}', "must be a whole benchmark run"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path, capsys, content, sentence):
    good = store(Run(HERE, [ROW]), tmp_path / "good.json")
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    assert main([str(good), str(bad)]) == 2
    assert sentence in capsys.readouterr().err


def test_rows_twice_and_no_rows_in_common_get_a_sentence(compared):
    assert "must hold every row once, got attention: joint" in compared([ROW, ROW], [ROW])[2]
    assert "must have rows in common" in compared([ROW], [ratio(2.0, id="other")])[2]


@pytest.mark.parametrize("share", ["five", "120%", "-3%"])
def test_a_bad_threshold_gets_a_sentence(compared, capsys, share):
    with pytest.raises(SystemExit):
        compared([ROW], [ROW], f"--fail-over={share}")
    assert "must be a share such as 5% or 0.05" in capsys.readouterr().err
