"""The rows as ratios: all of them in one picture, and op by op as bars with their spread."""

from __future__ import annotations

import statistics

from vkernels.bench.report.chart import Axis, Bar, Bars, Dot, Group, Key, Plot, logarithmic
from vkernels.bench.report.words import dtype, name, positive, spread, times, told, verdict
from vkernels.bench.results import Row

SIDES = ("rival faster", "vkernels faster")
COLOURS = {"win": "ours", "even": "even", "loss": "loss"}
SHAPES = {"win": "circle", "even": "square", "loss": "diamond"}
NAMES = {"win": "vkernels faster", "even": "even: the spread holds 1×", "loss": "rival faster"}
AXIS = "times as fast as the rival"


def by_op(rows: list[Row]) -> dict[str, list[Row]]:
    """In the order of the run."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.op), []).append(row)
    return found


def axis(rows: list[Row]) -> Axis:
    values = [v for row in rows for v in (positive(row.ratio), *(spread(row) or ())) if v is not None]
    return logarithmic(values, AXIS, times, around=1.0)


def overview(rows: list[Row]) -> Plot | None:
    """A line per op, a mark per row. Dtypes lie a little apart, so that equal ratios do not hide each other."""
    ops = {op: [r for r in of if positive(r.ratio) is not None] for op, of in by_op(rows).items()}
    ops = {op: of for op, of in ops.items() if of}
    if not ops:
        return None
    dots, ticks = [], []
    for line, (op, of) in enumerate(ops.items()):
        middle = statistics.median([positive(row.ratio) or 1.0 for row in of])
        ticks.append((float(line), f"{op}\nmedian {times(middle)}"))
        dots.append(Dot(middle, line, "ink", "tick"))
        lanes = {kind: lane for lane, kind in enumerate(dict.fromkeys(str(row.dtype) for row in of))}
        for row in of:
            kind = verdict(row)
            shift = (lanes[str(row.dtype)] - (len(lanes) - 1) / 2) * min(0.3, 0.75 / len(lanes))
            dots.append(Dot(positive(row.ratio) or 1.0, line + shift, COLOURS[kind], SHAPES[kind], kind, told(row)))
    present = {dot.series for dot in dots}
    legend = [Key(kind, NAMES[kind], COLOURS[kind], SHAPES[kind]) for kind in COLOURS if kind in present]
    legend.append(Key("", "median of the operation", "ink", "tick"))
    return Plot(
        name="overview",
        title="Every measured row, by operation",
        x=axis([row for of in ops.values() for row in of]),
        y=Axis("", -0.6, len(ops) - 0.4, tuple(ticks), log=False),
        height=44 * len(ops) + 10,
        dots=tuple(dots),
        legend=tuple(legend),
        rule=1.0,
        sides=SIDES,
    )


def bars(op: str, rows: list[Row]) -> Bars:
    """A heading per case, a bar per dtype and rival."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((name(row), str(row.model), str(row.direction), str(row.cache)), []).append(row)
    drawn = []
    for (title, model, direction, cache), of in groups.items():
        detail = [model] if model else []
        detail += [direction] if direction not in title and any(r.direction != direction for r in rows) else []
        detail += [f"{cache} cache"] if cache != "warm" else []
        drawn.append(Group(title, " · ".join(detail), tuple(_bar(row) for row in of)))
    return Bars(f"ratios-{slug(op)}", f"{op}: speed against each rival", axis(rows), 1.0, tuple(drawn), SIDES)


def _bar(row: Row) -> Bar:
    kind, ratio = verdict(row), positive(row.ratio)
    label = f"{dtype(row.dtype)} vs {row.rival}"
    if ratio is None:
        return Bar(label, None, "loss", f"could not run: {row.why or 'no reason given'}", tip=told(row))
    return Bar(label, ratio, COLOURS[kind], times(ratio), spread(row), positive(row.target), told(row))


def slug(text: str) -> str:
    """A name for a file."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text.lower())
    return "-".join(part for part in safe.split("-") if part)[:60] or "unnamed"


def headline(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by verdict, the largest ratio first."""
    found: dict[str, list[Row]] = {kind: [] for kind in ("win", "even", "loss", "absent")}
    for row in rows:
        found[verdict(row)].append(row)
    for of in found.values():
        of.sort(key=lambda row: -(positive(row.ratio) or 0))
    return found
