"""Rows against what the machine can do at best: FLOP per byte across, rate upwards, the measured ceilings as lines."""

from __future__ import annotations

from typing import Any

from vkernels.bench.report.chart import Dot, Key, Line, Note, Plot, logarithmic
from vkernels.bench.report.palette import cycled
from vkernels.bench.report.words import case, digits, dtype, duration, flops, percent, positive
from vkernels.bench.results import Row, Run

SHAPES = {"float32": "circle", "bfloat16": "square", "float16": "diamond"}


def ceilings(environment: dict[str, Any]) -> tuple[float | None, dict[str, float]]:
    """(bytes in TB/s, TFLOP/s by dtype), as far as the run knows them; dtypes with the same ceiling share one name."""
    copy = positive(environment.get("copy_gb_per_s"))
    rates = environment.get("gflop_per_s")
    flat: dict[float, list[str]] = {}
    for name, rate in (rates if isinstance(rates, dict) else {}).items():
        if (known := positive(rate)) is not None:
            flat.setdefault(known / 1e3, []).append(dtype(name))
    return (copy / 1e3 if copy else None), {", ".join(names): rate for rate, names in flat.items()}


def roofline(run: Run) -> Plot | None:
    rows = _ours(run.rows)
    copy, flat = ceilings(run.environment)
    if not rows or copy is None or not flat:
        return None
    ops = list(dict.fromkeys(str(row.op) for row in rows))
    dots = [dot for row in rows for dot in _dots(row, cycled(ops.index(str(row.op))))]
    stems = [_stem(row, cycled(ops.index(str(row.op)))) for row in rows if positive(row.rival_ms)]
    knees = [rate / copy for rate in flat.values()]
    reach = [dot.x for dot in dots] + knees + [max(knees) * 4]
    x = logarithmic(reach, "FLOP per byte that must move", digits)
    top = max(flat.values())
    y = logarithmic([dot.y for dot in dots] + [top * 1.3], "work per second", flops)
    lines, notes = [], []
    for name, rate in flat.items():
        knee = rate / copy
        first = max(x.low, y.low / copy)
        start = (first, first * copy) if first < knee else (x.low, rate)
        lines.append(Line((start, (knee, rate), (x.high, rate)) if first < knee else (start, (x.high, rate)), "axis"))
        notes.append(Note(max(knee, x.low) * 1.08, rate, f"{name} {flops(rate)}", under=rate < top))
    notes.append(Note(max(knees) * 0.72, top, f"copy {digits(copy * 1e3)} GB/s", "end"))
    shapes = dict.fromkeys(str(row.dtype) for row in rows)
    legend = [Key(op, op, cycled(i)) for i, op in enumerate(ops)]
    legend += [Key("", dtype(name), "soft", SHAPES.get(name, "circle")) for name in shapes]
    legend.append(Key("", "the fastest rival", "soft", hollow=True))
    return Plot(
        name="roofline",
        title="Roofline",
        x=x,
        y=y,
        height=430,
        lines=(*lines, *stems),
        dots=tuple(dots),
        notes=tuple(notes),
        legend=tuple(legend),
    )


def _case(row: Row) -> tuple[str, ...]:
    return tuple(str(part) for part in row.key[:-1])


def _ours(rows: list[Row]) -> list[Row]:
    """One row per case of ours, beside its fastest rival; without those that compute nothing or have no time."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if not (positive(row.flop) and positive(row.bytes) and positive(row.ours_ms)):
            continue
        key = _case(row)
        known = best.get(key)
        if known is None or (positive(row.rival_ms) or 1e300) < (positive(known.rival_ms) or 1e300):
            best[key] = row
    return list(best.values())


def left_out(rows: list[Row]) -> int:
    """Cases that compute nothing, which a roofline cannot show."""
    return len({_case(r) for r in rows if positive(r.ours_ms) and not (positive(r.flop) and positive(r.bytes))})


def _rate(row: Row, ms: float) -> float:
    return row.flop / ms / 1e9


def _dots(row: Row, colour: str) -> list[Dot]:
    at, shape = row.flop / row.bytes, SHAPES.get(str(row.dtype), "circle")
    name = f"{row.op}: {case(row)}"
    ours = _rate(row, row.ours_ms)
    share = f", {percent(row.roofline_share)} of the roofline" if positive(row.roofline_share) else ""
    tip = f"{name}\n{flops(ours)} at {digits(at)} FLOP/B in {duration(row.ours_ms)}{share}"
    dots = [Dot(at, ours, colour, shape, str(row.op), tip)]
    if rival := positive(row.rival_ms):
        theirs = _rate(row, rival)
        tip = f"{name}\n{row.rival}: {flops(theirs)} of the same work in {duration(rival)}"
        dots.insert(0, Dot(at, theirs, colour, shape, str(row.op), tip, hollow=True))
    return dots


def _stem(row: Row, colour: str) -> Line:
    at = row.flop / row.bytes
    return Line(((at, _rate(row, row.rival_ms or 1.0)), (at, _rate(row, row.ours_ms))), colour, str(row.op), thin=True)
