"""Stages of the reference model: plain PyTorch beside vkernels, each as a share of the larger."""

from __future__ import annotations

from vkernels.bench.report.chart import Bar, Bars, Group, linear
from vkernels.bench.report.words import dtype, duration, memory, percent, positive, times
from vkernels.bench.results import Stage


def stages(found: list[Stage]) -> list[Bars]:
    """A chart of times and, where it was read, one of peak memory."""
    charts = [_chart("time", found), _chart("memory", found)]
    return [chart for chart in charts if chart.groups]


def _chart(what: str, found: list[Stage]) -> Bars:
    groups, reach = [], [1.0]
    for stage in found:
        pair = (stage.plain_ms, stage.ours_ms) if what == "time" else (stage.plain_mb, stage.ours_mb)
        plain, ours = positive(pair[0]), positive(pair[1])
        if plain is None or ours is None:
            continue
        text = duration if what == "time" else memory
        share = ours / plain
        reach.append(share)
        gain = times(positive(stage.ratio) if what == "time" else plain / ours)
        name = f"{stage.stage} · {dtype(stage.dtype)}".replace("`", "")
        between = f" ({times(stage.ratio_p20)} to {times(stage.ratio_p80)})" if what == "time" else ""
        tip = f"{name}\nplain PyTorch {text(plain)}, vkernels {text(ours)}: {gain}{between}"
        colour = "ours" if share <= 1 else "loss"
        bars = (
            Bar("plain PyTorch", 1.0, "rival", text(plain), tip=tip),
            Bar("vkernels", share, colour, f"{text(ours)}, {gain}", tip=tip),
        )
        groups.append(Group(name, str(stage.model), bars))
    title = f"Reference model: {'time' if what == 'time' else 'peak memory'} of each stage"
    return Bars(f"stages-{what}", title, linear(reach, f"share of plain PyTorch's {what}", percent), 0.0, tuple(groups))
