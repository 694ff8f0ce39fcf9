"""Numbers as a reader says them, and what a row amounts to. A run is a file: nothing in it is trusted."""

from __future__ import annotations

import math
from typing import Any

from vkernels.bench.results import Row

NOTHING = "–"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def finite(value: Any) -> float | None:
    """The number, or None where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def positive(value: Any) -> float | None:
    """What a logarithmic axis can show."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def digits(value: float) -> str:
    """Three significant ones, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))}f}"


def duration(ms: Any) -> str:
    number = finite(ms)
    if number is None:
        return NOTHING
    if number >= 1000:
        return f"{digits(number / 1000)} s"
    return f"{digits(number)} ms" if number >= 1 or number == 0 else f"{digits(number * 1000)} µs"


def memory(mb: Any) -> str:
    number = finite(mb)
    if number is None:
        return NOTHING
    if number >= 1000:
        return f"{digits(number / 1000)} GB"
    return f"{digits(number)} MB" if number >= 1 or number == 0 else f"{digits(number * 1000)} kB"


def flops(tflop_per_s: Any) -> str:
    number = finite(tflop_per_s)
    if number is None:
        return NOTHING
    return f"{digits(number)} TFLOP/s" if number >= 1 else f"{digits(number * 1000)} GFLOP/s"


def times(ratio: Any) -> str:
    number = finite(ratio)
    if number is None:
        return NOTHING
    return f"{number:.2f}×" if 0.01 <= number < 1 else f"{digits(number)}×"


def percent(share: Any) -> str:
    number = finite(share)
    return NOTHING if number is None else f"{100 * number:.0f} %"


def plain(value: Any) -> str:
    number = finite(value)
    return NOTHING if number is None else digits(number)


def dtype(name: Any) -> str:
    return SHORT.get(str(name), str(name))


def spread(row: Row) -> tuple[float, float] | None:
    low, high = positive(row.ratio_p20), positive(row.ratio_p80)
    return (low, high) if low is not None and high is not None and low <= high else None


def verdict(row: Row) -> str:
    """win and loss: the spread too lies on that side of 1; even: it holds 1; absent: the rival could not run."""
    ratio = positive(row.ratio)
    if ratio is None:
        return "absent"
    low, high = spread(row) or (ratio, ratio)
    if min(low, ratio) > 1:
        return "win"
    return "loss" if max(high, ratio) < 1 else "even"


def below_target(row: Row) -> bool:
    ratio, target = positive(row.ratio), positive(row.target)
    return ratio is not None and target is not None and ratio < target


def name(row: Row) -> str:
    """What is computed, with its frames."""
    frames = finite(row.frames)
    known = frames is None or f"{frames:.0f}" in str(row.id)
    return str(row.id) if known else f"{row.id}, {frames:.0f} frames"


def case(row: Row) -> str:
    """The row without its rival."""
    extra = [dtype(row.dtype)]
    if str(row.direction) not in str(row.id):
        extra.append(str(row.direction))
    if row.cache and row.cache != "warm":
        extra.append(f"{row.cache} cache")
    return f"{name(row)} · {' · '.join(extra)}"


def told(row: Row) -> str:
    """A row in lines, as the page's tooltips show it."""
    lines = [f"{row.op}: {case(row)}"]
    if row.model:
        lines.append(str(row.model))
    ratio = positive(row.ratio)
    if ratio is None:
        return "\n".join([*lines, f"{row.rival} could not run: {row.why or 'no reason given'}"])
    between = spread(row)
    band = f" ({times(between[0])} to {times(between[1])})" if between else ""
    lines.append(f"{duration(row.ours_ms)}, {row.rival} {duration(row.rival_ms)}: {times(ratio)}{band}")
    if row.roofline_share:
        lines.append(f"{percent(row.roofline_share)} of the roofline")
    if below_target(row):
        lines.append(f"below its target of {times(row.target)}")
    return "\n".join(lines)
