"""What a run found: the JSON, written after every stage, and the short table that comes last."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any


def file_name(run: dict[str, Any]) -> str:
    """gpu-nvidia-h200-2026-11-21-1a2b3c4.json"""
    facts = run["environment"]
    words = re.sub(r"[^a-z0-9]+", "-", facts.get("gpu", "unknown").lower()).strip("-")
    return f"gpu-{words}-{facts['date']}-{facts['commit']}.json"


def store(run: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(run)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(run, indent=1) + "\n")
    written.replace(path)
    return path


def best(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest rival that ran."""
    ran = [r for r in row.get("rivals", []) if "ms" in r]
    return min(ran, key=lambda r: r["ms"]) if ran else None


def verdict(row: dict[str, Any], gpu: str) -> str:
    if row.get("passed") is None:
        return "-"
    if "H200" not in gpu:
        return "not judged"  # the targets are stated for that GPU
    return "pass" if row["passed"] else "MISS"


HEAD = ["case", "dtype", "direction", "backend", "ms", "against the best", "GB/s", "of copy", "TFLOP/s", "target", ""]


def cells(row: dict[str, Any], gpu: str) -> list[str]:
    rival = best(row)
    against = "no rival ran" if rival is None else (
        f"{rival['ratio']:.2f}x ({rival['ratio_p20']:.2f} to {rival['ratio_p80']:.2f}) {rival['name']}"
    )  # fmt: skip
    return [
        f"{row['op']}: {row['id']}",
        row["dtype"],
        row["direction"],
        row["backend"],
        f"{row['ms']:.4g}",
        against,
        f"{row['gb_per_s']:.0f}",
        f"{row['copy_share']:.0%}",
        f"{row['tflop_per_s']:.0f}",
        row["target"] or "-",
        verdict(row, gpu),
    ]


def table(run: dict[str, Any]) -> str:
    """Every measured row, in columns."""
    gpu = run["environment"].get("gpu", "")
    rows = [HEAD, *(cells(row, gpu) for row in run["race"] if row["status"] == "measured")]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(run: dict[str, Any]) -> str:
    """The README's table of a committed run."""
    facts, limits = run["environment"], run["ceilings"]
    lines = [
        f"Measured {facts['date']} on {facts['gpu']} (driver {facts['driver']}), torch {facts['torch']}, Triton "
        f"{facts['triton']}, commit {facts['commit']}. On that machine a copy reaches "
        f"{limits['copy_gb_per_s']:.0f} GB/s and a bf16 matrix product {limits['bf16_tflop_per_s']:.0f} TFLOP/s.",
        "",
        "| " + " | ".join([*HEAD[:-1], "met"]) + " |",
        "|" + "---|" * len(HEAD),
    ]
    rows = [row for row in run["race"] if row["status"] == "measured"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row, facts["gpu"])) + " |" for row in rows)])


def summary(run: dict[str, Any]) -> str:
    """Counts per op, and every failure and omission in a sentence."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in run["proof"] if "op" in row):
        count = Counter(row["status"] for row in run["proof"] if row.get("op") == op)
        lines.append(f"{op}: {', '.join(f'{n} {status}' for status, n in sorted(count.items()))}")
    for row in failures(run):
        lines.append(f"FAILED {row.get('stage', '')} {row.get('op', '')} {row['id']}: {row['why']}")
    omitted = Counter(
        f"{row.get('op', row.get('stage', ''))}: {row['why']}" for row in everything(run) if row["status"] == "skipped"
    )
    lines += [f"skipped {count} of {why}" for why, count in omitted.items()]
    missed = sum(row.get("passed") is False for row in run["race"])
    met = sum(row.get("passed") is True for row in run["race"])
    lines.append(f"{met} targets met, {missed} missed, {len(failures(run))} failures")
    return "\n".join(lines)


def everything(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [*run["proof"], *run["sanitizer"], *run["race"], *run["lost"]]


def failures(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in everything(run) if row["status"] == "failed"]
