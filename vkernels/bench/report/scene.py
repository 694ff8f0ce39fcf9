"""A drawing in pixels: rectangles, strokes, marks and words, in palette colours. All that `svg` and `png` know."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace

EM = 0.57  # mean width of a letter of the page's fonts, in font sizes


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    w: float
    h: float
    colour: str
    edge: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Stroke:
    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0
    dashed: bool = False
    series: str = ""


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    size: float
    shape: str
    colour: str
    hollow: bool = False
    series: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Words:
    x: float
    y: float  # of the baseline
    text: str
    colour: str = "soft"
    size: float = 12.0
    anchor: str = "start"
    bold: bool = False
    series: str = ""  # set: part of the legend, which brings its series to the front


Item = Rect | Stroke | Mark | Words


@dataclass(frozen=True)
class Scene:
    name: str
    title: str
    width: float
    height: float
    items: tuple[Item, ...]

    def moved(self, dx: float, dy: float) -> tuple[Item, ...]:
        return tuple(_moved(item, dx, dy) for item in self.items)


def _moved(item: Item, dx: float, dy: float) -> Item:
    if isinstance(item, Stroke):
        return replace(item, points=tuple((x + dx, y + dy) for x, y in item.points))
    return replace(item, x=item.x + dx, y=item.y + dy)


def width_of(text: str, size: float = 12.0) -> float:
    return EM * size * len(text)


def wrapped(text: str, room: float, size: float = 12.0) -> list[str]:
    """The text in lines that `room` pixels hold."""
    return textwrap.wrap(text, max(8, int(room / (EM * size)))) or [""]


def fitted(text: str, room: float, size: float = 12.0) -> str:
    """The text, or as much of it as `room` pixels hold."""
    most = max(1, int(room / (EM * size)))
    return text if len(text) <= most else text[: max(1, most - 1)].rstrip(" ,;") + "…"
