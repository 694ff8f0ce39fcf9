"""All rows in one table that the page's script sorts and filters."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from vkernels.bench.report.words import (
    NOTHING,
    below_target,
    dtype,
    duration,
    finite,
    flops,
    memory,
    percent,
    plain,
    positive,
    spread,
    times,
    verdict,
)
from vkernels.bench.results import Row

NAMES = {"win": "faster", "even": "even", "loss": "slower", "absent": "could not run"}


def _text(field: str, words: Callable[[Any], str] = str) -> Callable[[Row], tuple[str, Any]]:
    return lambda row: (words(getattr(row, field)), None)


def _number(field: str, words: Callable[[Any], str]) -> Callable[[Row], tuple[str, Any]]:
    return lambda row: (words(getattr(row, field)), finite(getattr(row, field)))


def _frames(row: Row) -> tuple[str, Any]:
    number = finite(row.frames)
    return (NOTHING if number is None else f"{number:,.0f}"), number


def _ratio(row: Row) -> tuple[str, Any]:
    ratio, between = positive(row.ratio), spread(row)
    if ratio is None:
        return str(row.why or "could not run"), None
    return times(ratio) + (f" ({times(between[0])} to {times(between[1])})" if between else ""), ratio


def _target(row: Row) -> tuple[str, Any]:
    target = positive(row.target)
    return (NOTHING if target is None else f"{times(target)}{' missed' if below_target(row) else ''}"), target


def _error(value: Any) -> str:
    number = finite(value)
    return NOTHING if number is None else f"{number:.0e}"


# heading, what a cell shows and sorts by (None: by its text); the numbers stand on the right
COLUMNS: tuple[tuple[str, bool, Callable[[Row], tuple[str, Any]]], ...] = (
    ("op", False, _text("op")),
    ("case", False, _text("id")),
    ("dtype", False, _text("dtype", dtype)),
    ("rival", False, _text("rival")),
    ("ratio (p20 to p80)", True, _ratio),
    ("result", False, lambda row: (NAMES[verdict(row)], None)),
    ("vkernels", True, _number("ours_ms", duration)),
    ("rival's time", True, _number("rival_ms", duration)),
    ("target", True, _target),
    ("roofline", True, _number("roofline_share", percent)),
    ("GB/s", True, _number("gb_per_s", plain)),
    ("rate", True, _number("tflop_per_s", lambda rate: flops(positive(rate)))),
    ("peak memory", True, _number("peak_mb", memory)),
    ("rival's peak", True, _number("rival_peak_mb", memory)),
    ("error", True, _number("error", _error)),
    ("rival's error", True, _number("rival_error", _error)),
    ("model", False, _text("model")),
    ("frames", True, _frames),
    ("direction", False, _text("direction")),
    ("cache", False, _text("cache")),
    ("backend", False, _text("backend")),
)


def table(rows: list[Row]) -> str:
    """Columns that no row fills are left out."""
    if not rows:
        return ""
    cells = [[show(row) for row in rows] for _, _, show in COLUMNS]
    shown = [
        (name, right, column)
        for (name, right, _), column in zip(COLUMNS, cells, strict=True)
        if any(text not in ("", NOTHING) for text, _ in column)
    ]
    head = "".join(
        f"<th scope=col aria-sort=none class='{'num' if right else ''}'><button type=button>{name}</button></th>"
        for name, right, _ in shown
    )
    body = ""
    for index, row in enumerate(rows):
        line = "".join(_cell(*column[index], right) for _, right, column in shown)
        attributes = " ".join(
            f"data-{key}='{escape(str(value), quote=True)}'"
            for key, value in (("op", row.op), ("dtype", dtype(row.dtype)), ("result", NAMES[verdict(row)]))
        )
        body += f"<tr class='r-{verdict(row)}' {attributes}>{line}</tr>"
    choices = (
        _choice("op", "all operations", [str(row.op) for row in rows]),
        _choice("dtype", "all dtypes", [dtype(row.dtype) for row in rows]),
        _choice("result", "all results", [NAMES[verdict(row)] for row in rows]),
    )
    return (
        "<div class=filters><input id=search type=search placeholder='Filter: words that must all occur' "
        f"aria-label='Filter the rows'>{''.join(choices)}"
        f"<output id=count aria-live=polite>{len(rows)} rows</output></div>"
        "<div class='scroll tall' tabindex=0 role=region aria-label='All rows'><table id=table><thead>"
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, value: float | None, right: bool) -> str:
    number = "" if value is None else f" data-v='{value!r}'"
    if right:
        missing = "" if value is not None or text == NOTHING else " why"
        return f"<td class='num{missing}'{number}>{escape(text)}</td>"
    return f"<td>{escape(text)}</td>"


def _choice(key: str, every: str, values: list[str]) -> str:
    options = "".join(f"<option value='{escape(v, quote=True)}'>{escape(v)}</option>" for v in dict.fromkeys(values))
    return f"<select data-key={key} aria-label='{every}'><option value=''>{every}</option>{options}</select>"
