"""What a benchmark run found, as it is stored: the one format that the runner writes and that the report, the
comparison, the gate and the README's table read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One call of ours beside one rival. Times are medians of alternating samples, in ms; p20 and p80 their spread."""

    id: str  # what is computed, as a reader would say it
    op: str
    dtype: str
    rival: str
    model: str = ""  # whose shape it is
    frames: int | None = None
    direction: str = "forward"  # or "forward + backward"
    cache: str = "warm"  # or "cold": inputs were not in the last-level cache
    backend: str = ""  # ours, as the dispatcher chose it
    ours_ms: float = 0.0
    ours_p20_ms: float = 0.0
    ours_p80_ms: float = 0.0
    rival_ms: float | None = None  # None: it could not run, and `why` says why
    rival_p20_ms: float | None = None
    rival_p80_ms: float | None = None
    ratio: float | None = None  # median of the pairs' ratios: theirs over ours
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    why: str | None = None
    target: float | None = None
    flop: float = 0.0  # at the least
    bytes: float = 0.0
    gb_per_s: float = 0.0
    tflop_per_s: float = 0.0
    roofline_share: float = 0.0
    peak_mb: float | None = None
    rival_peak_mb: float | None = None
    error: float | None = None  # against float64, relative to the largest value
    rival_error: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two runs' rows the same measurement."""
        return (self.op, self.id, self.dtype, self.direction, self.cache, self.rival)


@dataclass(frozen=True)
class Point:
    """One place on a growth curve: `who` ("vkernels" or a rival) at a number of tokens."""

    op: str
    id: str  # the curve
    dtype: str
    who: str
    tokens: int
    work: float  # what the algorithm must do there: visible pairs for attention, tokens for everything else
    frames: int | None = None
    ms: float | None = None  # None: it did not run, and `why` says why (out of memory, too slow)
    peak_mb: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the reference model: plain PyTorch beside vkernels over the same weights."""

    stage: str
    dtype: str
    plain_ms: float
    ours_ms: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    model: str = ""
    target: float | None = None
    plain_mb: float | None = None
    ours_mb: float | None = None


@dataclass(frozen=True)
class Run:
    """Everything one invocation measured, and on what. environment: date, commit, machine, threads, isa or gpu,
    copy_gb_per_s, gflop_per_s by dtype, torch, vkernels, python."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    growth: list[Point] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)


_Record = TypeVar("_Record", Row, Point, Stage)


def _read(record: type[_Record], raw: dict[str, Any], path: Path) -> _Record:
    known = {f.name for f in fields(record)}
    if unknown := set(raw) - known:
        raise ValueError(f"bench: {path} must hold the fields of {record.__name__}, got also {sorted(unknown)}")
    return record(**raw)


def load(path: str | Path) -> Run:
    """Read a run. Raises ValueError in a sentence on a file that is not one."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: {path} must be JSON, got {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"bench: {path} must be a benchmark run of format {FORMAT}, got {got!r}")
    try:
        return Run(
            environment=raw["environment"],
            rows=[_read(Row, row, path) for row in raw["rows"]],
            growth=[_read(Point, point, path) for point in raw["growth"]],
            stages=[_read(Stage, stage, path) for stage in raw["stages"]],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"bench: {path} must be a whole benchmark run, got {error}") from None


def store(run: Run, path: str | Path) -> Path:
    """Write a run; the file is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"format": FORMAT, **asdict(run)}, indent=1) + "\n")
    part.replace(path)
    return path
