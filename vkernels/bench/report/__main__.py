"""python -m vkernels.bench.report RUN.json --out FOLDER"""

from __future__ import annotations

import argparse
import sys

from vkernels.bench.report import write
from vkernels.bench.results import load


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vkernels.bench.report", description="A stored run as a page.")
    parser.add_argument("run", help="what `python -m vkernels bench` stored")
    parser.add_argument("--out", default="report", help="folder of index.html and the PNGs")
    parser.add_argument("--no-images", action="store_true", help="the page alone")
    arguments = parser.parse_args(argv)
    try:
        run = load(arguments.run)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(write(run, arguments.out, images=not arguments.no_images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
