"""python -m benchmarks [--op NAME ...] [--out FILE]: measure, print, store as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

import vkernels
from benchmarks.measure import Bench, measure
from vkernels.library import native, native_missing
from vkernels.roofline import measure_cpu

FAMILIES = (
    "attention",
    "divided_attention",
    "masks",
    "apply_rope",
    "qkv_prologue",
    "rearrange",
    "kv_cache",
    "integrations",
)
FOLDER = Path(__file__).parent / "results"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def environment() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER).stdout
    ceiling = measure_cpu()
    return {
        "date": date.today().isoformat(),
        "commit": commit.strip(),
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": native().isa_active() if native_missing() is None else "none",
        "copy_gb_per_s": ceiling.bytes_per_s / 1e9,
        "gflop_per_s": {k: v / 1e9 for k, v in ceiling.flop_per_s.items()},
        "torch": torch.__version__,
        "vkernels": vkernels.__version__,
        "python": platform.python_version(),
    }


def benches(families: list[str]) -> list[Bench]:
    return [bench for family in families for bench in import_module(f"benchmarks.cases.{family}").benches()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time for one ratio")
    parser.add_argument("--out", type=Path, default=FOLDER / "cpu.json")
    arguments = parser.parse_args()

    facts = environment()
    rates = ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in facts["gflop_per_s"].items())
    print(f"{facts['machine']}, {facts['threads']} threads, {facts['isa']}")
    print(f"copy {facts['copy_gb_per_s']:.1f} GB/s, {rates}")
    heads = f"{'ours ms':>9} {'rival ms':>9} {'ratio':>7} {'target':>7} {'roofline':>8}"
    print(f"{'case':58} {'dtype':9} {'rival':28} {heads}")
    rows, failed = [], 0
    for bench in benches(arguments.family):
        if arguments.match not in bench.id:
            continue
        try:
            measured = measure(bench, measure_cpu(), arguments.seconds)
        except AssertionError as error:
            print(f"FAILED, so not timed: {error}")
            failed += 1
            continue
        for row in measured:
            rows.append(row.as_dict())
            target = f"{row.target:.2f}" if row.target else "-"
            mark = " *" if row.target and row.ratio < row.target else ""
            print(
                f"{row.id:58} {row.dtype:9} {row.rival:28} {row.ours_ms:9.3f} {row.rival_ms:9.3f} {row.ratio:6.2f}x "
                f"{target:>7} {row.roofline_share:7.0%}{mark}",
                flush=True,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    print(f"stored in {arguments.out}; * marks a ratio under its target")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
