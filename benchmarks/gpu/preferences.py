"""vkernels/preferences.json from a run's races: which backend is the faster, per chip, op and kind of call."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.supervise import ROOT

FILE = ROOT / "vkernels" / "preferences.json"
Rows = list[dict[str, Any]]


def preferences(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """op -> kind -> backend -> time over the fastest's: the geometric mean over the cases and directions that every
    backend measured on that kind has. Kinds that only one backend serves are left out."""
    cases: dict[tuple[str, str], dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["status"] == "measured" and row.get("kind"):
            case = (row["id"], row["dtype"], row["direction"])
            cases[row["op"], row["kind"]][case][row["backend"]] = row["ms"]
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (op, kind), raced in sorted(cases.items()):
        backends = set.union(*(set(times) for times in raced.values()))
        shared = [times for times in raced.values() if set(times) == backends]
        if len(backends) < 2 or not shared:
            continue
        mean = {b: math.exp(sum(math.log(times[b]) for times in shared) / len(shared)) for b in sorted(backends)}
        found[op][kind] = {b: round(ms / min(mean.values()), 3) for b, ms in mean.items()}
    return dict(found)


def update(chip: str, rows: Rows, file: Path = FILE) -> int:
    """Writes what `rows` say of `chip` over what the file says of the same kinds; how many kinds that were."""
    found = preferences(rows)
    table = json.loads(file.read_text())
    for op, kinds in found.items():
        table.setdefault(chip, {}).setdefault(op, {}).update(kinds)
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return sum(len(kinds) for kinds in found.values())
