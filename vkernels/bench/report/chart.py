"""What a plot says, as data: axes, bars, lines and dots in the units of what was measured. `layout` turns it into a
scene, which `svg` and `png` draw."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

Ticks = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Axis:
    label: str
    low: float
    high: float
    ticks: Ticks
    log: bool = True

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`; values outside lie on the border."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def thinned(self, gap: float) -> Ticks:
        """The ticks of which no two lie nearer than `gap` of the axis; the last one always stays."""
        kept: list[tuple[float, str]] = []
        for tick in reversed(self.ticks):
            if not kept or abs(self.place(kept[-1][0]) - self.place(tick[0])) >= gap:
                kept.append(tick)
        return tuple(reversed(kept))


def _neat(text: str) -> str:
    """A tick's words without zeros that say nothing."""
    return re.sub(r"(\.\d*?)0+(?!\d)", lambda found: found[1] if len(found[1]) > 1 else "", text)


def logarithmic(values: Iterable[float], label: str, text, around: float | None = None, pad: float = 1.15) -> Axis:
    """An axis that holds the values, ticks at 1, 2, 5 or at powers of ten; `around` is a value it always shows well."""
    known = [v for v in values if v > 0 and math.isfinite(v)]
    if around is not None:
        known += [around / 2, around * 4]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    low, high = low / pad, high * pad
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades <= 2.2 else (1,)
    stride = max(1, math.ceil(decades / 7))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [s * 10.0**p for p in powers if len(steps) > 1 or p % stride == 0 for s in steps]
    return Axis(label, low, high, tuple((mark, _neat(text(mark))) for mark in marks if low <= mark <= high))


def linear(values: Iterable[float], label: str, text) -> Axis:
    """From 0 to past the largest value, in four to eight round steps."""
    most = max([v for v in values if math.isfinite(v)], default=1.0) or 1.0
    rough = most / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(s for s in (1, 2, 5, 10) if s * unit >= rough)
    count = math.ceil(most / step - 1e-9)
    return Axis(
        label, 0.0, max(most * 1.02, count * step), tuple((i * step, text(i * step)) for i in range(count + 1)), False
    )


@dataclass(frozen=True)
class Bar:
    """From the chart's base to `end`; without an end, `text` says why there is none."""

    label: str
    end: float | None
    colour: str
    text: str
    spread: tuple[float, float] | None = None
    target: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Group:
    title: str
    detail: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars under headings. sides: what lies left and right of the base."""

    name: str
    title: str
    x: Axis
    base: float
    groups: tuple[Group, ...]
    sides: tuple[str, str] | None = None


@dataclass(frozen=True)
class Line:
    points: tuple[tuple[float, float], ...]
    colour: str
    series: str = ""
    dashed: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    colour: str
    shape: str = "circle"  # or square, diamond, cross, tick
    series: str = ""
    tip: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Note:
    """Words above a place of the plot, or under it; anchor: start or end."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    under: bool = False


@dataclass(frozen=True)
class Key:
    """A line of the legend."""

    series: str
    text: str
    colour: str
    shape: str = "circle"
    hollow: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines and dots over two axes. A y axis that is not logarithmic holds categories, from the top."""

    name: str
    title: str
    x: Axis
    y: Axis
    height: int
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    notes: tuple[Note, ...] = ()
    legend: tuple[Key, ...] = ()
    rule: float | None = None  # a value of x that matters
    sides: tuple[str, str] | None = None  # what lies left and right of the rule
