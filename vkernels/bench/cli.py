"""python -m vkernels bench: what a call costs here, beside what one would otherwise write."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from vkernels.bench.machine import environment
from vkernels.bench.measure import Bench, measure
from vkernels.bench.results import Row, Run, store
from vkernels.roofline import measure_cpu

FAMILIES = ("attention", "divided_attention", "masks", "apply_rope", "qkv_prologue", "rearrange", "kv_cache")


def benches(families: list[str]) -> list[Bench]:
    return [bench for family in families for bench in import_module(f"vkernels.bench.cases.{family}").benches()]


def line(row: Row) -> str:
    target = f"{row.target:.2f}" if row.target else "-"
    mark = " *" if row.target and row.ratio and row.ratio < row.target else ""
    return (
        f"{row.id:58} {row.dtype:9} {row.rival:28} {row.ours_ms:9.3f} {row.rival_ms:9.3f} {row.ratio:6.2f}x "
        f"{target:>7} {row.roofline_share:7.0%}{mark}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vkernels bench", description=__doc__)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time for one ratio")
    parser.add_argument("--out", type=Path, help="store the run as JSON")
    arguments = parser.parse_args(argv)
    facts = environment()
    print(f"{facts['machine']}, {facts['threads']} threads, {facts['isa']}")
    rows: list[Row] = []
    failed = 0
    for bench in benches(arguments.family):
        if arguments.match not in bench.id:
            continue
        try:
            measured = measure(bench, measure_cpu(), arguments.seconds)
        except AssertionError as error:
            print(f"FAILED, so not timed: {error}")
            failed += 1
            continue
        rows += measured
        print("\n".join(map(line, measured)), flush=True)
    if arguments.out:
        print(f"stored in {store(Run(facts, rows), arguments.out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
