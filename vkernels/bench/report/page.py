"""index.html: one self-contained page about one run. It loads nothing, from nowhere, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from vkernels.bench.report import gallery, palette, svg
from vkernels.bench.report.chart import Bars, Plot
from vkernels.bench.report.layout import HALF, NARROW, WIDE, scene
from vkernels.bench.report.masks import ENTRIES
from vkernels.bench.report.ratios import headline
from vkernels.bench.report.roofline import left_out
from vkernels.bench.report.scaling import Curve
from vkernels.bench.report.table import table
from vkernels.bench.report.words import below_target, case, dtype, flops, plain, positive, times
from vkernels.bench.results import Row, Run

HERE = resources.files("vkernels.bench.report")
METHOD = (
    "Correct first: both outputs are compared before anything is timed; a case that differs has no speed.",
    "In turn: ours, rival, ours, rival; the ratio is the median of the pairs, its 20th and 80th percentile the spread.",
    "The rival is what one would otherwise write, with its masks and compiled code prepared outside the timed part, "
    "except where building them is the case.",
    "The roofline is measured at the start of the run: a large copy and a large matrix product; bytes and FLOP are "
    "those needed at the least, so a rate cannot be raised by doing more work.",
    "Losses stay: a ratio under 1× is drawn to the left of the line, and a rival that could not run says why.",
)
FACTS = {
    "copy_gb_per_s": ("copy", lambda v: f"{plain(v)} GB/s"),
    "gflop_per_s": ("matrix product", lambda v: _rates(v)),
}

UNFOLDED = 80  # bars; of more, only operations that lose somewhere are unfolded


@dataclass(frozen=True)
class Figures:
    """The charts of a run; None or empty where it measured nothing of the kind."""

    overview: Plot | None
    ratios: list[Bars]
    roofline: Plot | None
    curves: list[Curve]
    stages: list[Bars]

    def every(self) -> list[Bars | Plot]:
        single = [chart for chart in (self.overview, self.roofline) if chart is not None]
        return [*single, *self.ratios, *(plot for curve in self.curves for plot in curve.plots), *self.stages]


def page(run: Run, figures: Figures) -> str:
    sections = {
        "results": _results(run, figures),
        "ratios": _ratios(figures),
        "roofline": _roofline(run, figures),
        "growth": _growth(figures),
        "model": _stages(figures),
        "masks": _masks(),
        "rows": _rows(run),
        "machine": _machine(run),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f"<a href='#{name}'>{name}</a>" for name in sections)
    body = "".join(f"<section id={name}>{inner}</section>" for name, inner in sections.items())
    style, script = palette.style() + _part("style.css"), _part("script.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>vkernels: {escape(_machine_name(run.environment))}</title><style>{style}</style></head>"
        f"<body><main>{_header(run, links)}{body}</main><script>{script}</script></body></html>"
    )


def _part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _drawn(chart: Bars | Plot, width: int = WIDE) -> str:
    """For a desk and for a hand; the style sheet shows one of them."""
    return svg.draw(scene(chart, width), "wide") + svg.draw(scene(chart, NARROW), "narrow")


def _machine_name(environment: dict[str, Any]) -> str:
    return str(environment.get("gpu") or environment.get("machine") or "an unnamed machine")


def _header(run: Run, links: str) -> str:
    found = headline(run.rows)
    ran = sum(len(found[kind]) for kind in ("win", "even", "loss"))
    if ran:
        said = f"Faster in {len(found['win'])} of {ran} measured rows"
    elif run.rows:
        said = "No rival could run"
    else:
        said = "Benchmark report"
    env = run.environment
    parts = [_machine_name(env)]
    parts += [f"{env['threads']} threads"] if env.get("threads") else []
    parts += [str(env[key]) for key in ("isa", "date") if env.get(key)]
    parts += [f"commit {env['commit']}"] if env.get("commit") else []
    return (
        "<header><button id=theme type=button aria-label='Switch between light and dark'>◐</button>"
        f"<p class=eyebrow>vkernels benchmarks</p><h1>{escape(said)}</h1>"
        f"<p class=lead>{escape(' · '.join(parts))}</p><nav>{links}</nav></header>"
    )


def _results(run: Run, figures: Figures) -> str:
    if not run.rows:
        return ""
    found = headline(run.rows)
    missed = sum(below_target(row) for row in run.rows)
    targets = sum(positive(row.target) is not None for row in run.rows)
    tiles = [
        ("win", len(found["win"]), "faster", _best(found["win"][:1])),
        ("even", len(found["even"]), "even", "the spread of the ratio holds 1×"),
        ("loss", len(found["loss"]), "slower", _best(found["loss"][-1:]) or "no rival was faster"),
        (
            "absent",
            len(found["absent"]),
            "rivals could not run",
            "each says why below" if found["absent"] else "all ran",
        ),
    ]
    if targets:
        tiles.append(("target", missed, "below target", f"of {targets} ratios with a target of their own"))
    cards = "".join(
        f"<div class='tile t-{kind}'><b>{count}</b><span>{name}</span><small>{escape(words)}</small></div>"
        for kind, count, name, words in tiles
    )
    losses = _list("Where a rival is faster", [(_named(row), times(row.ratio)) for row in reversed(found["loss"])])
    absent = _list(
        "Rivals that could not run", [(_named(row), str(row.why or "no reason given")) for row in found["absent"]]
    )
    picture = _drawn(figures.overview) if figures.overview else ""
    return f"<h2>Wins and losses</h2><div class=tiles>{cards}</div>{picture}{losses}{absent}"


def _best(rows: list[Row]) -> str:
    return "".join(f"{times(row.ratio)} against {row.rival}, {row.op}" for row in rows)


def _named(row: Row) -> str:
    return f"{row.op}, {case(row)}, vs {row.rival}"


def _list(title: str, pairs: list[tuple[str, str]], most: int = 6) -> str:
    if not pairs:
        return ""
    lines = [f"<li>{escape(name)}: <b>{escape(said)}</b></li>" for name, said in pairs]
    rest = (
        f"<details><summary>{len(lines) - most} more</summary><ul>{''.join(lines[most:])}</ul></details>"
        if lines[most:]
        else ""
    )
    return f"<h3>{title}</h3><ul class=found>{''.join(lines[:most])}</ul>{rest}"


def _ratios(figures: Figures) -> str:
    if not figures.ratios:
        return ""
    many = sum(len(group.bars) for chart in figures.ratios for group in chart.groups) > UNFOLDED
    charts = "".join(
        f"<details{'' if many and not _loses(chart) else ' open'}><summary>{escape(chart.title.split(':')[0])}"
        f"</summary>{_drawn(chart)}</details>"
        for chart in figures.ratios
    )
    return (
        "<h2>Ratios, operation by operation</h2><p>How many times as fast as each rival. A bar is the median, the line "
        "on it the 20th to 80th percentile; a dashed tick is a target. Each operation has a scale of its own, "
        f"logarithmic.</p>{charts}"
    )


def _loses(chart: Bars) -> bool:
    return any(bar.colour == "loss" for group in chart.groups for bar in group.bars)


def _roofline(run: Run, figures: Figures) -> str:
    if figures.roofline is None:
        return ""
    out = left_out(run.rows)
    note = f" {out} {'case computes' if out == 1 else 'cases compute'} nothing and cannot be shown here." if out else ""
    return (
        "<h2>Roofline</h2><p>Grey lines are what this machine was measured to do at best: under the slope memory "
        "decides, under the flat parts arithmetic. Filled marks are vkernels; the hollow one on the same stem is the "
        "fastest rival at the same work. Point at a mark or tab to it, or choose an operation in the legend."
        f"{note}</p>"
        f"{_drawn(figures.roofline)}"
    )


def _growth(figures: Figures) -> str:
    blocks = ""
    for curve in figures.curves:
        charts = "".join(f"<figure>{_drawn(plot, HALF)}</figure>" for plot in curve.plots)
        lines = "".join(f"<li>{escape(line)}</li>" for line in curve.growth)
        lines += "".join(f"<li class=why>✕ {escape(line)}</li>" for line in curve.absences)
        blocks += f"<h3>{escape(curve.op)}: {escape(curve.name)}</h3><div class=pair>{charts}</div>"
        blocks += f"<ul class=found>{lines}</ul>"
    if not blocks:
        return ""
    return (
        "<h2>Growth with the length of the video</h2><p>Time and peak memory against tokens, both logarithmic; a cross "
        f"is where a contender did not run.</p>{blocks}"
    )


def _stages(figures: Figures) -> str:
    if not figures.stages:
        return ""
    charts = "".join(f"<h3>{escape(chart.title)}</h3>{_drawn(chart)}" for chart in figures.stages)
    return (
        f"<h2>The reference model, stage by stage</h2><p>The same weights, plain PyTorch beside vkernels.</p>{charts}"
    )


def _masks() -> str:
    figures = "".join(
        f"<figure><figcaption><b>{escape(entry.title)}</b></figcaption>{svg.draw(gallery.pictured(entry), 'mask')}"
        f"<figcaption><code>{escape(entry.code)}</code>{escape(entry.words)}<small>{gallery.counted(entry)}</small>"
        "</figcaption></figure>"
        for entry in ENTRIES
    )
    g = gallery.SMALL
    return (
        "<h2>Masks: who sees whom</h2><p>Drawn by the library from the masks themselves. Left, the pattern: a row is a "
        f"query, a column a key, {g.t} frames of {g.h} × {g.w} tokens one after another, a colour per {g.h * g.w} "
        f"keys. Right, what a kernel does with it in tiles of {gallery.BLOCK} × {gallery.BLOCK}, in the order in which "
        "it reads the tokens. The last line counts these tiles, and the same mask at a real size in tiles of "
        f"{gallery.REAL_BLOCK}.</p>"
        "<p class=legend><i class=full></i>runs without mask code<i class=masked></i>runs with mask code"
        f"<i class=skipped></i>never visited</p><div class=masks>{figures}</div>"
    )


def _rows(run: Run) -> str:
    inner = table(run.rows)
    return inner and f"<h2>All rows</h2><p>Click on a heading to sort, again to turn the order round.</p>{inner}"


def _rates(value: Any) -> str:
    pairs = value.items() if isinstance(value, dict) else ()
    return ", ".join(
        f"{dtype(name)} {flops(rate / 1e3 if isinstance(rate, (int, float)) else None)}" for name, rate in pairs
    )


def _listed(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machine(run: Run) -> str:
    facts = ""
    for key, value in run.environment.items():
        name, words = FACTS.get(key, (str(key).replace("_", " "), _listed))
        facts += f"<tr><th scope=row>{escape(name)}</th><td>{escape(words(value))}</td></tr>"
    method = "".join(f"<li>{escape(line)}</li>" for line in METHOD)
    return (
        f"<h2>Machine and method</h2><div class=pair><div class=scroll><table class=plain>{facts}</table></div>"
        f"<ol class=method>{method}</ol></div>"
    )
