"""python -m vkernels_video.claims [--only tokens masking ...] [--seeds 0 1 2] [--missing] [--page]

Runs the experiments, keeps their records in docs/claims/, and writes docs/claims.md from all records there are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vkernels_video import machine
from vkernels_video.claims import branch, frames, long, masking, page, stream, tokens

CLAIMS = (tokens.CLAIM, masking.CLAIM, long.CLAIM, branch.CLAIM, frames.CLAIM, stream.CLAIM)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print a line for every measurement
    names = [claim.name for claim in CLAIMS]
    parser = argparse.ArgumentParser(prog="python -m vkernels_video.claims", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="experiments (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--missing", action="store_true", help="run only what has no record yet")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of claims.md and claims/")
    arguments = parser.parse_args(argv)
    folder = arguments.docs / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    for claim in CLAIMS:
        if arguments.page or claim.name not in arguments.only:
            continue
        for seed in arguments.seeds:
            if arguments.missing and str(seed) in read(folder, claim.name).get("seeds", {}):
                continue
            print(f"{claim.name}, seed {seed}", file=sys.stderr, flush=True)
            started = time.perf_counter()
            record = claim.run(seed) | {"minutes": round((time.perf_counter() - started) / 60, 1)}
            described = machine.describe()
            seeds = {**read(folder, claim.name).get("seeds", {}), str(seed): record}
            kept = {
                "machine": f"{described['processor']}, {described['cores']} cores",
                "torch": torch.__version__,
                "seeds": seeds,
            }
            (folder / f"{claim.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    text = page.write(CLAIMS, {name: read(folder, name) for name in names})
    (arguments.docs / "claims.md").write_text(text)
    return 0


def read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


if __name__ == "__main__":
    raise SystemExit(main())
