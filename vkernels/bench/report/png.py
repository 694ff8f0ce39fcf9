"""A scene as PNG, for places that show no page. Needs matplotlib and says so where it is absent."""

from __future__ import annotations

import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

from vkernels.bench.report.palette import THEMES, colour
from vkernels.bench.report.scene import Mark, Rect, Scene, Stroke, Words
from vkernels.bench.report.svg import STROKED, outline

INCH = 100  # pixels of a scene
DPI = 180
TITLE = 40  # pixels above a scene for its name
MARGIN = 16


def why_not() -> str | None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "report: no PNG was written, because matplotlib is not installed (pip install matplotlib)"
    return None


def write(scene: Scene, folder: Path) -> list[Path]:
    """`folder`/<name>-light.png and -dark.png."""
    return [_write(scene, folder / f"{scene.name}-{theme}.png", theme) for theme in THEMES]


def _write(scene: Scene, path: Path, theme: str) -> Path:
    from matplotlib.figure import Figure

    width, height = scene.width + 2 * MARGIN, scene.height + TITLE + 2 * MARGIN
    figure = Figure(figsize=(width / INCH, height / INCH), dpi=DPI, facecolor=colour("card", theme))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    title = Words(MARGIN, MARGIN + 18, scene.title, "ink", 17, bold=True)
    items = (title, *scene.moved(MARGIN, MARGIN + TITLE))
    for order, (kind, run) in enumerate(groupby(items, type)):
        _PENS[kind](axes, list(run), theme, order)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter the font lacks is drawn as a box
        figure.savefig(path)
    return path


def _points(pixels: float) -> float:
    return pixels * 72 / INCH


def _rects(axes: Any, rects: list[Rect], theme: str, order: int) -> None:
    from matplotlib.collections import PolyCollection

    corners = [((r.x, r.y), (r.x + r.w, r.y), (r.x + r.w, r.y + r.h), (r.x, r.y + r.h)) for r in rects]
    faces = [colour(r.colour, theme) for r in rects]
    edges = [colour(r.edge, theme) if r.edge else "none" for r in rects]
    axes.add_collection(PolyCollection(corners, facecolors=faces, edgecolors=edges, linewidths=0.6, zorder=order))


def _strokes(axes: Any, strokes: list[Stroke], theme: str, order: int) -> None:
    from matplotlib.collections import LineCollection

    lines = LineCollection(
        [s.points for s in strokes],
        colors=[colour(s.colour, theme) for s in strokes],
        linewidths=[_points(s.width) for s in strokes],
        linestyles=[(0, (4, 3)) if s.dashed else "-" for s in strokes],
        zorder=order,
    )
    axes.add_collection(lines)


def _marks(axes: Any, marks: list[Mark], theme: str, order: int) -> None:
    for mark in marks:
        _mark(axes, mark, theme, order)


def _lines(axes: Any, lines: list[Words], theme: str, order: int) -> None:
    for words in lines:
        _words(axes, words, theme, order)


def _mark(axes: Any, m: Mark, theme: str, order: int) -> None:
    from matplotlib.patches import Circle, Polygon

    paint = colour(m.colour, theme)
    if m.shape in STROKED:
        ends = outline(m)
        for a, b in zip(ends[::2], ends[1::2], strict=True):
            axes.plot([a[0], b[0]], [a[1], b[1]], color=paint, linewidth=_points(2.4), zorder=order)
        return
    look = (
        {"facecolor": "none", "edgecolor": paint}
        if m.hollow
        else {"facecolor": paint, "edgecolor": colour("card", theme)}
    )
    shape = Circle((m.x, m.y), m.size) if m.shape == "circle" else Polygon(outline(m))
    shape.set(linewidth=_points(1.4 if m.hollow else 0.8), zorder=order, **look)
    axes.add_patch(shape)


def _words(axes: Any, w: Words, theme: str, order: int) -> None:
    place = {"start": "left", "middle": "center", "end": "right"}[w.anchor]
    first, *rest = w.text.split("\n")
    for i, line in enumerate((first, *rest)):
        axes.text(
            w.x,
            w.y + i * w.size * 1.25,
            line.encode(errors="replace").decode(),
            color=colour(w.colour, theme),
            fontsize=_points(w.size),
            fontweight="bold" if w.bold else "normal",
            ha=place,
            va="baseline",
            parse_math=False,
            zorder=order,
        )


_PENS: dict[type, Any] = {Rect: _rects, Stroke: _strokes, Mark: _marks, Words: _lines}
