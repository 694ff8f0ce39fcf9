"""A scene as inline SVG. Colours are classes, so that the page's theme decides them; every string is escaped."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from vkernels.bench.report.scene import Item, Mark, Rect, Scene, Stroke, Words

STROKED = ("cross", "tick")


def draw(scene: Scene, kind: str = "") -> str:
    """kind: a class of the page's style sheet."""
    body = "".join(_drawn(item) for item in scene.items)
    return (
        f"<svg class='{escape(kind, quote=True)}' data-chart='{escape(scene.name, quote=True)}' role=group "
        f"aria-label='{escape(scene.title, quote=True)}' viewBox='0 0 {scene.width:g} {scene.height:g}' "
        f"width={scene.width:g} height={scene.height:g}>{body}</svg>"
    )


def _drawn(item: Item) -> str:
    return _PENS[type(item)](item)


def _hold(body: str, tip: str, series: str = "") -> str:
    """What a pointer or the keyboard can reach says its tip; what belongs to a series can be brought to the front."""
    extra = f" data-series='{escape(series, quote=True)}'" if series else ""
    if tip:
        said = escape(tip, quote=True)
        return f"<g class=hit tabindex=0 role=img aria-label='{said}' data-tip='{said}'{extra}>{body}</g>"
    return f"<g{extra}>{body}</g>" if extra else body


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _rect(r: Rect) -> str:
    edge = f" s-{r.edge}" if r.edge else ""
    body = (
        f"<rect x={_n(r.x)} y={_n(r.y)} width={_n(max(r.w, 0))} height={_n(max(r.h, 0))} class='f-{r.colour}{edge}' />"
    )
    return _hold(body, r.tip)


def _stroke(s: Stroke) -> str:
    points = " ".join(f"{_n(x)},{_n(y)}" for x, y in s.points)
    dashes = " stroke-dasharray='4 4'" if s.dashed else ""
    body = f"<polyline points='{points}' class='s-{s.colour} stroke' stroke-width={_n(s.width)}{dashes} />"
    return _hold(body, "", s.series)


def outline(mark: Mark) -> list[tuple[float, float]]:
    """The corners of a mark that has some; for a cross and a tick, the ends of their strokes."""
    x, y, r = mark.x, mark.y, mark.size
    if mark.shape == "square":
        r *= 0.88
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if mark.shape == "diamond":
        r *= 1.25
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if mark.shape == "tick":
        return [(x, y - 2 * r), (x, y + 2 * r)]
    return [(x - r, y - r), (x + r, y + r), (x - r, y + r), (x + r, y - r)]


def _mark(m: Mark) -> str:
    paint = f"s-{m.colour} hollow" if m.hollow else f"f-{m.colour} s-card"
    if m.shape == "circle":
        body = f"<circle cx={_n(m.x)} cy={_n(m.y)} r={_n(m.size)} class='{paint}' />"
    elif m.shape in STROKED:
        ends = [f"{_n(x)} {_n(y)}" for x, y in outline(m)]
        path = "".join(f"M{a}L{b}" for a, b in zip(ends[::2], ends[1::2], strict=True))
        body = f"<path d='{path}' class='s-{m.colour} stroke' stroke-width=2.4 />"
    else:
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in outline(m))
        body = f"<polygon points='{points}' class='{paint}' />"
    return _hold(body, m.tip, m.series)


def _words(w: Words) -> str:
    bold = " font-weight=650" if w.bold else ""
    lines = w.text.split("\n")
    if len(lines) > 1:
        spans = "".join(
            f"<tspan x={_n(w.x)} dy={_n(0 if i == 0 else w.size * 1.25)}>{escape(line)}</tspan>"
            for i, line in enumerate(lines)
        )
    else:
        spans = escape(w.text)
    body = (
        f"<text x={_n(w.x)} y={_n(w.y)} class='f-{w.colour}' font-size={_n(w.size)} text-anchor={w.anchor}{bold}>"
        f"{spans}</text>"
    )
    if w.series:
        return f"<g class=key tabindex=0 role=button data-key='{escape(w.series, quote=True)}'>{body}</g>"
    return body


_PENS: dict[type, Callable[[Any], str]] = {Rect: _rect, Stroke: _stroke, Mark: _mark, Words: _words}
