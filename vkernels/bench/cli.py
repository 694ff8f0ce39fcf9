"""python -m vkernels bench: what a call costs here, beside what one would otherwise write. Without arguments: a telling
few in about a minute. `bench compare A B`, `bench gate` and `bench growth` are programs of their own."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vkernels.bench import runner
from vkernels.bench.machine import ceiling_of, environment
from vkernels.bench.measure import Settings, all_dtypes
from vkernels.bench.models import MODELS
from vkernels.bench.results import Row, Run, store
from vkernels.bench.select import Choice, lanes, quick_lanes
from vkernels.bench.stages import stages
from vkernels.spec import OPS

COMMANDS = ("compare", "gate", "growth")
QUICK_MINUTES = 1.0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vkernels bench", description=__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="everything this device can measure in reasonable time")
    add("--op", nargs="+", default=[], choices=[*OPS, "lower_mask", "integrations"])
    add("--model", nargs="+", default=[], choices=list(MODELS), help="what a layer of it asks for")
    add("--frames", nargs="+", type=int, default=[], help="of a model's video (8 64)")
    add("--match", default="", help="only cases whose op, name or model holds this")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", nargs="+", default=[], choices=list(all_dtypes()))
    add("--rival", nargs="+", default=[], help="only rivals whose name holds one of these")
    add("--backward", action="store_true", help="also forward and backward together")
    add("--cold", action="store_true", help="caches are emptied before every call")
    add("--all", action="store_true", help="also what takes long or much memory here")
    add("--stages", action="store_true", help="stages of the reference model instead of ops")
    add("--seconds", type=float, help="measuring time of one ratio (1; quick 0.5; a stage 6)")
    add("--minutes", type=float, help=f"nothing more is begun after so many (quick {QUICK_MINUTES:g})")
    add("--out", type=Path, help="store the run as JSON")
    add("--report", type=Path, help="write the run as a page into this folder")
    add("--benchmark-json", type=Path, help="store pytest-benchmark's own JSON")
    return parser.parse_args(argv)


def asked_for_more(asked: argparse.Namespace) -> bool:
    return bool(asked.full or asked.op or asked.model or asked.frames or asked.match or asked.rival or asked.all)


def _ms(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"


def heading() -> str:
    return f"{'case':62} {'dtype':9} {'against':36} {'ours ms':>9} {'theirs':>9} {'ratio':>7}  p20 to p80  roofline"


def line(row: Row) -> str:
    frames = f", {row.frames} frames" if row.frames and str(row.frames) not in row.id else ""
    name = f"{row.id}{frames}" + (", and backward" if row.direction != "forward" else "")
    whose = f" ({row.model})" if row.model else ""
    start = f"{(name + whose)[:62]:62} {row.dtype:9} {row.rival[:36]:36}"
    assert row.rival_ms is not None
    assert row.ratio is not None
    mark = " *" if row.target and row.ratio < row.target else ""
    return (
        f"{start} {_ms(row.ours_ms):>9} {_ms(row.rival_ms):>9} {row.ratio:6.2f}x  {row.ratio_p20:.2f} to "
        f"{row.ratio_p80:.2f}  {row.roofline_share:7.0%}{mark}"
    )


class Printer:
    """Rows as they come, an op's under its name, and stored: a run that is killed keeps what it found. At the end, who
    could not run and why."""

    def __init__(self, run: Run, out: Path | None) -> None:
        self.run, self.out = run, out
        self.op = ""
        self.absent: dict[str, list[str]] = {}

    def __call__(self, row: Row) -> None:
        if self.out:
            store(self.run, self.out)
        if row.ratio is None:
            self.absent.setdefault(row.why or "", []).append(f"{row.op} {row.rival}")
            return
        if row.op != self.op:
            self.op = row.op
            print(f"\n{row.op}")
        print(line(row), flush=True)

    def excuses(self) -> list[str]:
        return [f"could not run: {', '.join(dict.fromkeys(names))}: {why}" for why, names in self.absent.items()]


def summary(rows: list[Row]) -> str:
    measured = [row for row in rows if row.ratio is not None]
    if not measured:
        return "nothing was measured"
    slower = [row for row in measured if row.ratio is not None and row.ratio < 1]
    worst = f"; slower: {', '.join(f'{row.op} {row.id} {row.dtype}' for row in slower)}" if slower else ""
    under = sum(1 for row in measured if row.target and row.ratio is not None and row.ratio < row.target)
    short = f"; * {under} under their target" if under else ""
    return f"{len(measured) - len(slower)} of {len(measured)} faster than what they are against{worst}{short}"


def describe(facts: dict[str, Any]) -> str:
    rates = ", ".join(f"{k} {v:,.0f} GFLOP/s" for k, v in facts["gflop_per_s"].items())
    where = facts.get("gpu") or f"{facts['threads']} threads, {facts.get('isa')}"
    return (
        f"{facts['machine']}, {where}; torch {facts['torch']}, vkernels {facts['vkernels']}, commit {facts['commit']}\n"
        f"ceilings, measured now: copy {facts['copy_gb_per_s']:,.1f} GB/s, {rates}"
    )


def measure_ops(asked: argparse.Namespace, run: Run, ceiling: Any) -> list[str]:
    """Fills `run`; sentences about what was wrong."""
    quick = not asked_for_more(asked)
    choice = Choice(
        asked.op, asked.model, asked.frames, [all_dtypes()[name] for name in asked.dtype], asked.rival, asked.match,
        asked.backward, asked.all, asked.device,
    )  # fmt: skip
    minutes = asked.minutes or (QUICK_MINUTES if quick else float("inf"))
    settings = Settings(
        ceiling, asked.device, asked.seconds or (0.5 if quick else 1.0), asked.cold, memory=not quick,
        until=time.monotonic() + 60 * minutes,
    )  # fmt: skip
    chosen = quick_lanes(asked.device) if quick else lanes(choice, ceiling)
    print(heading())
    printer = Printer(run, asked.out)
    session = runner.Session(chosen, settings, printer, run.rows, left_out=choice.left_out)
    options = [f"--benchmark-json={asked.benchmark_json.resolve()}"] if asked.benchmark_json else []
    runner.run(session, options)
    for excuse in printer.excuses():
        print(f"\n{excuse}", end="")
    if choice.left_out:
        run.environment["left_out"] = choice.left_out
        print("\nleft out:", *choice.left_out, sep="\n  ")
    print(f"\n{summary(run.rows)}")
    if quick:
        print("This was the quick selection. More: --full, --op attention, --model qwen2_5_vl --frames 8 64, --help.")
    return session.failures


def command(name: str) -> Callable[[list[str]], int]:
    return import_module(f"vkernels.bench.{name}").main


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which memory is read from, says when it starts
    if argv and argv[0] in COMMANDS:
        return command(argv[0])(argv[1:])
    asked = parse(argv)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench: --device cuda needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    if not asked.stages and (why := runner.missing()):
        print(why, file=sys.stderr)
        return 2
    ceiling = ceiling_of(asked.device)
    run = Run(environment(ceiling, asked.device))
    print(describe(run.environment))
    if asked.stages:
        failures = stages(run.stages, asked.match, asked.seconds or 6.0)
    else:
        failures = measure_ops(asked, run, ceiling)
    for failure in failures:
        print(f"FAILED, so not timed: {failure}", file=sys.stderr)
    if asked.out:
        print(f"stored in {store(run, asked.out)}")
    if asked.report:
        print(f"the page is {import_module('vkernels.bench.report').write(run, asked.report)}")
    return 1 if failures else 0
