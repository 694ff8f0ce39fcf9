"""python -m vkernels.bench.report RUN.json [MORE.json ...] --out FOLDER"""

from __future__ import annotations

import argparse
import sys

from vkernels.bench.report import write
from vkernels.bench.results import Run, load

MACHINE = ("machine", "gpu", "threads", "isa")


def joined(runs: list[Run]) -> Run:
    """Parts of one picture, measured by several invocations on one machine; the ceilings are the first one's."""
    machines = [[run.environment.get(key) for key in MACHINE] for run in runs]
    if any(machine != machines[0] for machine in machines):
        raise ValueError(f"report: runs must be of one machine, got {' and '.join(map(str, machines))}")
    environment = dict(runs[0].environment)
    for key in ("date", "commit"):
        if told := dict.fromkeys(str(run.environment[key]) for run in runs if key in run.environment):
            environment[key] = ", ".join(told)
    return Run(
        environment,
        [row for run in runs for row in run.rows],
        [point for run in runs for point in run.growth],
        [stage for run in runs for stage in run.stages],
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vkernels.bench.report", description="Stored runs as a page.")
    parser.add_argument("runs", nargs="+", help="what `python -m vkernels bench` stored; several are shown as one")
    parser.add_argument("--out", default="report", help="folder of index.html and the PNGs")
    parser.add_argument("--no-images", action="store_true", help="the page alone")
    arguments = parser.parse_args(argv)
    try:
        run = joined([load(path) for path in arguments.runs])
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(write(run, arguments.out, images=not arguments.no_images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
