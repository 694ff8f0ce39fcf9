"""Growth: time and memory against tokens, one curve per contender, and where a contender did not run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vkernels.bench.growth import Grown, grown
from vkernels.bench.report.chart import Axis, Dot, Key, Line, Plot, logarithmic
from vkernels.bench.report.palette import cycled
from vkernels.bench.report.ratios import slug
from vkernels.bench.report.words import dtype, duration, memory, positive
from vkernels.bench.results import Point

HEIGHT = 250


@dataclass(frozen=True)
class Curve:
    """Both plots of one curve, and what is said under them."""

    name: str
    op: str
    plots: tuple[Plot, ...]
    growth: tuple[str, ...]
    absences: tuple[str, ...]


def curves(points: list[Point]) -> list[Curve]:
    found: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        if positive(point.tokens) is not None:
            found.setdefault((str(point.op), str(point.id), str(point.dtype)), []).append(_numbers(point))
    return [_curve(*key, sorted(of, key=lambda p: p.tokens)) for key, of in found.items()]


def _numbers(point: Point) -> Point:
    """The point with None or 0 where its numbers are none."""
    ms, peak_mb, work = positive(point.ms), positive(point.peak_mb), positive(point.work) or 0.0
    return replace(point, who=str(point.who), ms=ms, peak_mb=peak_mb, work=work)


def _curve(op: str, name: str, kind: str, points: list[Point]) -> Curve:
    whos = sorted(dict.fromkeys(p.who for p in points), key=lambda who: who != "vkernels")
    base = f"growth-{slug(f'{op} {name} {dtype(kind)}')}"
    wanted = (("time", "ms", duration), ("memory", "peak_mb", memory))
    plots = [_plot(f"{base}-{what}", f"{op}, {name}, {dtype(kind)}: {what}", points, whos, field, text)
             for what, field, text in wanted]  # fmt: skip
    said = tuple(line for who in whos for line in _absences(who, [p for p in points if p.who == who]))
    growth = tuple(line for side in grown(points) if (line := _growth(side)))
    return Curve(f"{name} · {dtype(kind)}", op, tuple(plot for plot in plots if plot), growth, said)


def _absences(who: str, points: list[Point]) -> list[str]:
    """Where `who` did not run, a line for each reason."""
    reasons: dict[str, list[Point]] = {}
    for point in points:
        if point.ms is None:
            reasons.setdefault(str(point.why or "did not run"), []).append(point)
    said = []
    for why, of in reasons.items():
        whole = len(of) > 1 and of == points[-len(of) :]
        where = f"from {of[0].tokens:,} tokens on" if whole else f"{', '.join(f'{p.tokens:,}' for p in of)} tokens"
        said.append(f"{who}, {where}: {why}")
    return said


def _growth(side: Grown) -> str:
    said = [f"time grows as tokens^({side.tokens})"] if side.tokens else []
    said += [f"as the work^({side.work})"] if side.work and said else []
    said += [f"memory as tokens^({side.memory})"] if side.memory else []
    return f"{side.who}: {', '.join(said)}" if said else ""


def _axis(points: list[Point]) -> Axis:
    """A tick at every measured length, with its frames where they are known."""
    places: dict[float, Any] = {float(p.tokens): p.frames for p in points}
    framed = all(positive(frames) for frames in places.values())
    ticks = tuple((at, f"{at:,.0f}" + (f"\n{frames:,}" if framed else "")) for at, frames in places.items())
    return Axis("tokens, and frames" if framed else "tokens", min(places) / 1.2, max(places) * 1.2, ticks)


def _plot(name: str, title: str, points: list[Point], whos: list[str], field: str, text: Any) -> Plot | None:
    values = {(p.who, p.tokens): v for p in points if (v := getattr(p, field)) is not None}
    if not values:
        return None
    label = "time" if field == "ms" else "peak memory"
    absent = len({p.who for p in points if p.ms is None})
    span = max(values.values()) / min(values.values())
    room = span ** (0.1 * (absent + 1)) if absent else 1.0  # for the crosses, above every curve
    y = logarithmic([*values.values(), max(values.values()) * room], label, text, pad=1.6)
    lines, dots, legend, crossed = [], [], [], 0
    for index, who in enumerate(whos):
        colour = "ours" if who == "vkernels" else cycled(max(index, 1))
        mine = [p for p in points if p.who == who]
        line = tuple((float(p.tokens), values[who, p.tokens]) for p in mine if (who, p.tokens) in values)
        if len(line) > 1:
            lines.append(Line(line, colour, who))
        dots += [Dot(a, b, colour, series=who, tip=f"{who}, {a:,.0f} tokens: {text(b)}") for a, b in line]
        legend.append(Key(who, who, colour))
        bad = [p for p in mine if p.ms is None]
        height = y.high / (y.high / y.low) ** (0.05 + 0.07 * crossed)
        crossed += bool(bad)
        for p in bad:
            said = f"{who}, {p.tokens:,} tokens: {p.why or 'did not run'}"
            dots.append(Dot(float(p.tokens), height, colour, "cross", who, said))
    return Plot(name, title, _axis(points), y, HEIGHT, tuple(lines), tuple(dots), legend=tuple(legend))
