"""Charts laid out as scenes of a given width."""

from __future__ import annotations

from vkernels.bench.report.chart import Axis, Bar, Bars, Group, Plot, Ticks
from vkernels.bench.report.scene import Item, Mark, Rect, Scene, Stroke, Words, fitted, width_of, wrapped

WIDE, HALF, NARROW = 980, 470, 350
ROW, HEAD, BAR = 21, 30, 12
FOOT = 44  # tick labels and the axis' own


def scene(chart: Bars | Plot, width: int = WIDE) -> Scene:
    return _bars(chart, width) if isinstance(chart, Bars) else _plot(chart, width)


def _bars(chart: Bars, width: int) -> Scene:
    gutter = 300 if width > 600 else 0  # without one, labels stand above their bars
    row = ROW if gutter else ROW + 15
    widest = max([width_of(bar.text) for group in chart.groups for bar in group.bars if bar.end is not None], default=0)
    left, right = gutter + 10 if gutter else 6, width - widest - 22
    top = 20 if chart.sides else 4

    def x(value: float) -> float:
        return left + chart.x.place(value) * (right - left)

    base, ticks = x(chart.base), _spaced(chart.x, right - left)
    items: list[Item] = _sides(chart.sides, base, right)
    y = float(top)
    for group in chart.groups:
        heading, y = _heading(group, y, width)
        end = y + row * len(group.bars)
        items += heading + [Stroke(((x(value), y), (x(value), end)), "line") for value, _ in ticks]
        items.append(Stroke(((base, y), (base, end)), "ink", 1.2))
        for bar in group.bars:
            items += _bar(bar, chart.base, x, y, gutter, width)
            y += row
        y += 4
    items += _scale(chart.x, ticks, x, y)
    return Scene(chart.name, chart.title, width, y + FOOT, tuple(items))


def _heading(group: Group, y: float, width: float) -> tuple[list[Item], float]:
    """The title on the left, the detail on the right, or under it where there is no room."""
    lines = wrapped(group.title, width, 14.5)  # bold letters are wider
    items: list[Item] = [Words(0, y + 20, "\n".join(lines), "ink", 13, bold=True)]
    y += HEAD + 16.25 * (len(lines) - 1)
    if not group.detail:
        return items, y
    if width_of(lines[-1], 14.5) + width_of(group.detail) + 20 < width:
        return [*items, Words(width, y - 10, group.detail, anchor="end")], y
    return [*items, Words(0, y + 6, fitted(group.detail, width))], y + 16


def _bar(bar: Bar, base: float, x, y: float, gutter: float, width: int) -> list[Item]:
    middle = y + ROW / 2 if gutter else y + ROW / 2 + 13
    if gutter:
        items: list[Item] = [Words(gutter, middle + 4, fitted(bar.label, gutter), anchor="end")]
    else:
        label = fitted(bar.label, width)
        items = [Rect(0, y, width_of(label), 16, "card"), Words(0, y + 12, label)]
    if bar.end is None:
        text = fitted(bar.text, width - gutter - 10)
        back = Rect(gutter + 8, middle - 9, width_of(text) + 4, 18, "card", tip=bar.tip)
        return [*items, back, Words(gutter + 10 if gutter else 0, middle + 4, text, "loss")]
    a, b = sorted((x(base), x(bar.end)))
    items.append(Rect(a, middle - BAR / 2, max(b - a, 1.5), BAR, bar.colour, tip=bar.tip))
    far = max(a, b)
    if bar.spread:
        low, high = (x(value) for value in bar.spread)
        far = max(far, high)
        items.append(Stroke(((low, middle), (high, middle)), "ink", 1.4))
        items += [Stroke(((end, middle - 3.5), (end, middle + 3.5)), "ink", 1.4) for end in (low, high)]
    if bar.target is not None:
        at = x(bar.target)
        items.append(Stroke(((at, middle - 9), (at, middle + 9)), "ink", 1.3, dashed=True))
        far = max(far, at) if at - far < 50 else far
    return [*items, Words(far + 6, middle + 4, bar.text, "ink", bold=True)]


def _spaced(axis: Axis, length: float) -> Ticks:
    """The ticks whose words do not touch on an axis of this length."""
    widest = max([width_of(line) for _, text in axis.ticks for line in text.split("\n")], default=0)
    return axis.thinned((widest + 12) / max(length, 1))


def _scale(axis: Axis, ticks: Ticks, x, bottom: float) -> list[Item]:
    """Ticks' words and the axis' own."""
    items: list[Item] = [Words(x(value), bottom + 16, text, anchor="middle") for value, text in ticks]
    lines = max([text.count("\n") for _, text in axis.ticks], default=0)
    middle = (x(axis.low) + x(axis.high)) / 2
    return [*items, Words(middle, bottom + 34 + 13 * lines, axis.label, anchor="middle")]


def _sides(sides: tuple[str, str] | None, base: float, right: float) -> list[Item]:
    if sides is None:
        return []
    worse, better = sides
    items: list[Item] = [Words(base + 8, 12, fitted(f"{better} →", right + 60 - base), "ours", 12, bold=True)]
    if width_of(f"← {worse}") + 8 <= base:
        items.append(Words(base - 8, 12, f"← {worse}", "loss", 12, "end", bold=True))
    return items


def _legend(chart: Plot, width: int) -> tuple[list[Item], float]:
    items: list[Item] = []
    x, y = 0.0, 12.0
    for key in chart.legend:
        size = width_of(key.text, 12.5) + 34
        if x and x + size > width:
            x, y = 0.0, y + 20
        items.append(Mark(x + 6, y - 4, 5, key.shape, key.colour, key.hollow))
        items.append(Words(x + 16, y, key.text, "soft", series=key.series))
        x += size
    return items, y + 14 if items else 0.0


def _plot(chart: Plot, width: int) -> Scene:
    legend, over = _legend(chart, width)
    sides = 20 if chart.sides else 0
    label = 20 if chart.y.label else 0
    widest = max([width_of(line, 12.5) for _, text in chart.y.ticks for line in text.split("\n")], default=0)
    left, right = min(widest + 10, 0.42 * width), width - 18.0
    top, bottom = over + sides + label + 6, over + sides + label + 6 + chart.height
    more = max([text.count("\n") for _, text in chart.x.ticks], default=0)

    def x(value: float) -> float:
        return left + chart.x.place(value) * (right - left)

    def y(value: float) -> float:
        share = chart.y.place(value)
        return bottom - share * (bottom - top) if chart.y.log else top + share * (bottom - top)

    ticks = _spaced(chart.x, right - left)
    items = legend + [Stroke(((x(value), top), (x(value), bottom)), "line") for value, _ in ticks]
    items += _scale(chart.x, ticks, x, bottom)
    if sides and chart.rule is not None:
        items += [_low(item, over) for item in _sides(chart.sides, x(chart.rule), right)]
    if label:
        items.append(Words(0, top - 10, chart.y.label))
    for value, text in chart.y.ticks:
        items.append(Stroke(((left, y(value)), (right, y(value))), "line"))
        lines = [fitted(line, left - 8) for line in text.split("\n")]
        items.append(Words(left - 8, y(value) + 4 - 7.5 * (len(lines) - 1), "\n".join(lines), anchor="end"))
    items.append(Stroke(((left, top), (left, bottom), (right, bottom)), "axis"))
    if chart.rule is not None:
        items.append(Stroke(((x(chart.rule), top), (x(chart.rule), bottom)), "ink", 1.2))
    for line in chart.lines:
        points = tuple((x(a), y(b)) for a, b in line.points)
        items.append(Stroke(points, line.colour, 1.1 if line.thin else 2.2, line.dashed, line.series))
    for note in chart.notes:
        height = y(note.y) + (16 if note.under else -7)
        at = max(x(note.x), left + 4 + width_of(note.text)) if note.anchor == "end" else x(note.x)
        items.append(Words(at, height, note.text, anchor=note.anchor))
    items += [Mark(x(d.x), y(d.y), 5, d.shape, d.colour, d.hollow, d.series, d.tip) for d in chart.dots]
    return Scene(chart.name, chart.title, width, bottom + FOOT + 13 * more, tuple(items))


def _low(item: Item, by: float) -> Item:
    return Scene("", "", 0, 0, (item,)).moved(0, by)[0]
