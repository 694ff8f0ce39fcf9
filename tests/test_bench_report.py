"""The benchmark report: what it says of a run, and the page itself in a real headless browser.

Planted bugs, each of which turned a test red: bars from half of 1x, or all to the right of it; labels on their bars; a
logarithmic axis drawn linear; a verdict by the median alone; tiles called full by their outer bounds, skipped a tile
too early, or full under a box; what could not run not crossed; headings, reasons, cells and attributes unescaped;
numbers sorted as text, missing ones first; a filter that takes any word, or the other operations; a theme that cannot
be chosen back, or that is dark on paper; no narrow charts, or both; a style attribute; tips that stay; the other series
of a legend; folds left open after printing; no default-src in the policy.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import random
import re
import socket
import sys
from html.parser import HTMLParser

import pytest
import torch
from browser import Browser, find

from vkernels.bench.report import __main__ as command
from vkernels.bench.report import gallery, masks, ratios, words, write
from vkernels.bench.report.chart import Bar, Bars, Group, linear, logarithmic
from vkernels.bench.report.layout import NARROW, WIDE, scene
from vkernels.bench.report.scaling import curves
from vkernels.bench.report.scene import Rect, Words, width_of
from vkernels.bench.results import Point, Row, Run, Stage, store
from vkernels.masks import VideoMask

MACHINE = {
    "machine": "a machine",
    "threads": 2,
    "isa": "avx2",
    "copy_gb_per_s": 50.0,
    "gflop_per_s": {"float32": 200.0, "bfloat16": 400.0, "float16": 200.0},
}
HOSTILE = "'\"></script><script>pwned=1</script><img src=x onerror=pwned=1>&$\\alpha{"


def row(ratio=2.0, **changes):
    fields = {
        "id": "a case", "op": "attention", "dtype": "float32", "rival": "SDPA", "ours_ms": 4.0, "flop": 4e8,
        "bytes": 1e7, "gb_per_s": 2.5, "tflop_per_s": 0.1, "roofline_share": 0.5, "ratio": ratio,
    }  # fmt: skip
    if ratio is not None:
        fields |= {"rival_ms": 4.0 * ratio, "ratio_p20": 0.95 * ratio, "ratio_p80": 1.05 * ratio}
    return Row(**(fields | changes))


ROWS = [
    row(12.5, id="quick", ours_ms=9.0),
    row(1.5, id="fair", ours_ms=100.0, target=2.0),
    row(0.5, id="slow", op="rearrange", ours_ms=20.0),
    row(1.02, id="even", op="rearrange", dtype="bfloat16", model="A model"),
    row(None, id="absent", rival="FlexAttention", why="it needs a compiler", ours_ms=3.0),
    row(math.nan, id="broken", ours_ms=math.nan, ratio_p20=None, rival_ms=None, flop=math.inf),
]
GROWTH = [
    Point("attention", "joint", "float32", who, n, float(n) ** 2, n // 64, ms=1e-6 * n**2, peak_mb=1e-3 * n)
    for who in ("vkernels", "SDPA")
    for n in (512, 1024, 2048, 4096)
]
GROWTH[-1] = dataclasses.replace(GROWTH[-1], ms=None, peak_mb=None, why="out of memory")
STAGES = [Stage("prefill", "float32", 100.0, 40.0, 2.5, 2.4, 2.6, "INTP", plain_mb=400.0, ours_mb=100.0)]
RUN = Run(MACHINE, ROWS, GROWTH, STAGES)
SECTIONS = ["results", "ratios", "roofline", "growth", "model", "masks", "rows", "machine"]


class Page(HTMLParser):
    """What a page would run or fetch, its sections, and its words."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.loads, self.handlers, self.sections, self.words = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sections += [value for key, value in attributes if tag == "section" and key == "id"]
        self.loads += [v for k, v in attributes if k in ("src", "data", "poster", "srcset")]
        self.loads += [v for k, v in attributes if k == "href" and not v.startswith("#")]
        self.handlers += [key for key, _ in attributes if key.startswith("on") or key == "style"]

    def handle_data(self, data):
        self.words.append(data)


def page(run, folder):
    return Page(write(run, folder, images=False))


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    found = page(RUN, tmp_path)
    assert found.sections == SECTIONS
    assert not found.loads
    assert not found.handlers
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", text)
    for said in ("Faster in 2 of 4 measured rows", "it needs a compiler", "Where a rival is faster",
                 "tokens^(2.00 ± 0.00)", "SDPA, 4,096 tokens: out of memory", "50.0 GB/s", "2.50×"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize(
    ("run", "sections"),
    [
        (Run({}), ["masks", "machine"]),
        (Run(MACHINE, [row()]), ["results", "ratios", "roofline", "masks", "rows", "machine"]),
        (Run({}, ROWS), ["results", "ratios", "masks", "rows", "machine"]),
        (Run(MACHINE, [ROWS[4]]), ["results", "ratios", "roofline", "masks", "rows", "machine"]),
        (Run(MACHINE, [ROWS[5]]), ["results", "ratios", "masks", "rows", "machine"]),
        (Run(MACHINE, [], GROWTH[:1]), ["growth", "masks", "machine"]),
        (Run(MACHINE, [], [], STAGES), ["model", "masks", "machine"]),
        (Run({"gflop_per_s": "?", "copy_gb_per_s": -1}, [row()]), ["results", "ratios", "masks", "rows", "machine"]),
    ],
    ids=["empty", "one row", "no machine", "nothing ran", "not a number", "one point", "stages", "odd machine"],
)
def test_what_was_not_measured_has_no_section(tmp_path, run, sections):
    assert page(run, tmp_path).sections == sections


def test_many_rows(tmp_path):
    random.seed(1)
    rows = [
        row(max(math.exp(random.gauss(1, 1)), i % 9 / 5), id=f"case {i}", op=f"op{i % 9}", flop=10.0 ** (i % 7 + 3))
        for i in range(300)
    ]
    found = page(Run(MACHINE, rows), tmp_path)
    assert found.tags.count("tr") >= 301
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    losing = {r.op for r in rows if words.verdict(r) == "loss"}
    assert text.count("<details open>") == len(losing) < 9
    assert (tmp_path / "index.html").stat().st_size < 3e6


def every_string_hostile(record):
    """`record` with HOSTILE in every field that is a word, and a number that is none in the others."""
    return dataclasses.replace(
        record, **{f.name: HOSTILE for f in dataclasses.fields(record) if isinstance(getattr(record, f.name), str)}
    )


def hostile_run():
    absent = dataclasses.replace(every_string_hostile(row(None, why="x", model="x")), id=HOSTILE + "\ud800\n2")
    return Run(
        {"machine": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}, "copy_gb_per_s": 50.0, "gflop_per_s": {HOSTILE: 1.0}},
        [every_string_hostile(row()), absent, dataclasses.replace(row(), ours_ms="fast", target=[], frames={})],
        [every_string_hostile(point) for point in GROWTH],
        [every_string_hostile(STAGES[0])],
    )


def test_hostile_words_stay_words(tmp_path):
    found = page(hostile_run(), tmp_path)
    assert "img" not in found.tags
    assert found.tags.count("script") == 1
    assert not found.handlers
    assert any(HOSTILE in said for said in found.words)


def test_a_verdict_needs_the_whole_spread():
    assert words.verdict(row(1.2, ratio_p20=1.1, ratio_p80=1.3)) == "win"
    assert words.verdict(row(1.2, ratio_p20=0.9, ratio_p80=1.3)) == "even"
    assert words.verdict(row(0.9, ratio_p20=0.8, ratio_p80=1.1)) == "even"
    assert words.verdict(row(0.9, ratio_p20=0.8, ratio_p80=0.95)) == "loss"
    assert words.verdict(row(0.9, ratio_p20=None)) == "loss"
    assert {words.verdict(row(bad)) for bad in (None, math.nan, math.inf, 0.0, -1.0)} == {"absent"}


def test_numbers_are_said_with_their_units():
    assert [words.duration(ms) for ms in (0.0, 0.1764, 5.0, 92.997, 6433.8, None)] == [
        "0 ms", "176 µs", "5.00 ms", "93.0 ms", "6.43 s", "–",
    ]  # fmt: skip
    assert [words.times(r) for r in (0.8, 2.4426, 34.5, 1154.04)] == ["0.80×", "2.44×", "34.5×", "1,154×"]
    assert [words.flops(t) for t in (0.1954, 790.0)] == ["195 GFLOP/s", "790 TFLOP/s"]
    assert [words.memory(m) for m in (0.0192, 484.36, 2048.0)] == ["19.2 kB", "484 MB", "2.05 GB"]
    assert words.plain(9.999) == "10.00"


def test_axes_have_round_ticks():
    assert [text for _, text in logarithmic([1, 30], "", words.times, around=1.0).ticks] == [
        "0.5×", "1×", "2×", "5×", "10×", "20×",
    ]  # fmt: skip
    assert [text for _, text in logarithmic([0.5, 2000], "", words.times).ticks] == ["1×", "10×", "100×", "1,000×"]
    assert [value for value, _ in linear([1.0], "", words.percent).ticks] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_bars_start_at_one_and_are_as_long_as_the_logarithm(width):
    axis = logarithmic([0.5, 4.0], "", words.times, around=1.0)
    ends = {"two": 2.0, "four": 4.0, "half": 0.5}
    chart = Bars("x", "x", axis, 1.0, (Group("g", "", tuple(Bar(k, v, "ours", "", tip=k) for k, v in ends.items())),))
    rects = {item.tip: item for item in scene(chart, width).items if isinstance(item, Rect) and item.tip}
    two, four, half = (rects[name] for name in ends)
    assert four.w == pytest.approx(2 * two.w)
    assert half.w == pytest.approx(two.w)
    assert two.x == four.x == pytest.approx(half.x + half.w)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_words_and_bars_do_not_cover_each_other(width):
    rows = ROWS + [row(ratio, rival=f"rival with a long name {ratio}") for ratio in (20.0, 0.5, 1.0, 1.5)]
    items = scene(ratios.bars("attention", rows), width).items
    bars = [item for item in items if isinstance(item, Rect) and item.colour != "card"]
    for said in (item for item in items if isinstance(item, Words)):
        left = said.x - {"start": 0, "middle": 0.5, "end": 1}[said.anchor] * width_of(said.text, said.size)
        for bar in bars:
            across = left < bar.x + bar.w and left + width_of(said.text, said.size) > bar.x
            assert not (across and said.y - 0.7 * said.size < bar.y + bar.h and said.y > bar.y), said


def test_a_rival_that_could_not_run_says_why_in_its_place():
    drawn = scene(ratios.bars("attention", [ROWS[0], ROWS[4]]))
    assert "could not run: it needs a compiler" in {item.text for item in drawn.items if isinstance(item, Words)}


def test_curves_say_how_they_grow_and_where_they_end():
    (curve,) = curves(GROWTH)
    crosses = [(dot.series, dot.x) for dot in curve.plots[0].dots if dot.shape == "cross"]
    assert crosses == [("SDPA", 4096.0)]
    assert curve.growth == (
        "vkernels: time grows as tokens^(2.00 ± 0.00), as the work^(1.00 ± 0.00), memory as tokens^(1.00 ± 0.00)",
        "SDPA: time grows as tokens^(2.00 ± 0.00), as the work^(1.00 ± 0.00), memory as tokens^(1.00 ± 0.00)",
    )
    assert curve.absences == ("SDPA, 4,096 tokens: out of memory",)
    cut = [dataclasses.replace(p, ms=None, why="too slow") if p.tokens > 512 else p for p in GROWTH[:4]]
    assert curves(cut)[0].absences == ("vkernels, from 1,024 tokens on: too slow",)


def test_the_gallery_shows_every_kind_of_mask():
    made = {name for name, _ in inspect.getmembers(VideoMask, inspect.ismethod)} - {"from_dict"}
    shown = " ".join(entry.code for entry in masks.ENTRIES)
    assert not [name for name in {*made, "keep", "with_globals", "&", "queries=True"} if name not in shown]


@pytest.mark.parametrize("entry", masks.ENTRIES, ids=lambda entry: entry.title)
@pytest.mark.parametrize("block", [8, 5])
def test_tiles_are_what_the_law_allows(entry, block):
    """A tile that is skipped holds no visible pair; one without mask code holds no other."""
    mask = entry.build(gallery.SMALL)
    plan, law = mask.plan(), mask.dense()
    kinds = gallery.tiles(plan, block)
    live_k = plan.len_k if plan.k_count is None else int(plan.k_count[0])
    live_q = plan.len_q if plan.q_count is None else int(plan.q_count[0])
    for group in range(plan.groups):
        order = torch.arange(plan.len_q)
        q = plan.q_rows[0].long() if plan.q_rows is not None else group * plan.q_stride[0] + order * plan.q_stride[1]
        k = plan.k_rows[0].long() if plan.k_rows is not None else group * plan.k_stride[0] + order * plan.k_stride[1]
        for i, line in enumerate(kinds.tolist()):
            for j, kind in enumerate(line):
                rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                seen = law[q[rows]][:, k[columns]]
                assert kind != gallery.SKIPPED or not seen.any()
                live = seen[: max(live_q - i * block, 0), : max(live_k - j * block, 0)]
                assert kind != gallery.FULL or (live.numel() and live.all())
    if plan.box is not None:
        assert not (kinds == gallery.FULL).any(), "kernels compare a box wherever they go"
    assert sum(gallery.shares(plan, block)) == pytest.approx(1)


def test_the_drawn_pattern_is_the_law():
    entry = next(e for e in masks.ENTRIES if e.title == "Dropped tokens")
    mask = entry.build(gallery.SMALL)
    area = sum(item.w * item.h for item in gallery._pattern(mask)[1:])
    pair = (gallery.SIDE / mask.tokens) ** 2
    assert area / pair == pytest.approx(int(mask.dense().sum()))


def test_pngs_for_both_themes(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run(MACHINE, [dataclasses.replace(row(), id=HOSTILE + "\ud800 漢", rival="$x_")])
    write(run, tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    plots = ("overview", "roofline", "ratios-attention", "masks")
    assert names == {f"{plot}-{theme}.png" for plot in plots for theme in ("light", "dark")}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_without_matplotlib_a_sentence_and_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="no PNG was written, because matplotlib is not installed"):
        path = write(Run({}), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_command_renders_a_stored_run(tmp_path, capsys):
    stored = store(RUN, tmp_path / "run.json")
    assert command.main([str(stored), "--out", str(tmp_path / "out"), "--no-images"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "index.html")
    (tmp_path / "bad.json").write_text("[]")
    assert command.main([str(tmp_path / "bad.json")]) == 2
    assert "must be a benchmark run" in capsys.readouterr().err
    other = store(dataclasses.replace(RUN, environment={**MACHINE, "threads": 64}), tmp_path / "other.json")
    assert command.main([str(stored), str(other)]) == 2
    assert "must be of one machine" in capsys.readouterr().err
    parts = [Run(MACHINE, ROWS), Run({**MACHINE, "date": "2026-01-01"}, [], GROWTH, STAGES)]
    files = [str(store(part, tmp_path / f"{i}.json")) for i, part in enumerate(parts)]
    assert command.main([*files, "--out", str(tmp_path / "both"), "--no-images"]) == 0
    both = Page(tmp_path / "both" / "index.html")
    assert both.sections == SECTIONS
    assert "a machine · 2 threads · avx2 · 2026-01-01" in both.words
    assert command.main([str(tmp_path / "absent.json")]) == 2


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    program = find()
    if program is None:
        sentence = "the report's page needs a Chromium on the PATH (apt-get install chromium), none was found"
        if os.environ.get("VKERNELS_CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    opened = Browser(program)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(RUN, tmp_path_factory.mktemp("report"), images=False)


@pytest.fixture
def shown(browser, written):
    browser.open(written)
    yield browser
    assert not browser.problems
    assert browser.requests == [written.resolve().as_uri()]


def column(browser, name):
    """What the visible rows show in a column, from the top."""
    script = """(() => {
        const heads = [...document.querySelectorAll('#table thead th')];
        const at = heads.findIndex(head => head.textContent === %s);
        const lines = [...document.querySelectorAll('#table tbody tr')].filter(line => line.checkVisibility());
        return [heads[at].getAttribute('aria-sort'), lines.map(line => line.cells[at].textContent)];
    })()"""
    return browser.run(script % json.dumps(name))


def heading(browser, name):
    find_it = "[...document.querySelectorAll('#table button')].find(b => b.textContent === %s).id = 'chosen'"
    browser.run("document.getElementById('chosen')?.removeAttribute('id')")
    browser.run(find_it % json.dumps(name))
    return "#chosen"


def test_every_chart_is_there_and_has_data(shown):
    names = ["overview", "ratios-attention", "ratios-rearrange", "roofline", "growth-attention-joint-fp32-time",
             "growth-attention-joint-fp32-memory", "stages-time", "stages-memory"]  # fmt: skip
    names += ["mask"] * len(masks.ENTRIES)
    visible = """[...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).map(s => [
        s.dataset.chart, s.getBoundingClientRect().width, s.querySelectorAll('rect, circle, polygon, path').length,
        [...s.querySelectorAll('rect, circle, polygon')].every(m => getComputedStyle(m).fill !== 'rgb(0, 0, 0)')])"""
    for width in (1280, 400):
        shown.look(width)
        charts = shown.run(visible)
        assert [name for name, *_ in charts] == names
        assert all(wide > 100 and marks >= 2 and coloured for _, wide, marks, coloured in charts)
        assert shown.run("document.documentElement.scrollWidth") <= width
        spilled = """[...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).filter(s => {
            const frame = s.getBoundingClientRect();
            return [...s.querySelectorAll('text')].some(t => t.getBoundingClientRect().right > frame.right + 12);
        }).map(s => s.dataset.chart)"""
        assert shown.run(spilled) == []


def test_numbers_sort_as_numbers_both_ways(shown):
    click = heading(shown, "vkernels")
    shown.click(click)
    assert column(shown, "vkernels") == [
        "ascending", ["3.00 ms", "4.00 ms", "9.00 ms", "20.0 ms", "100 ms", "–"],
    ]  # fmt: skip
    shown.click(click)
    assert column(shown, "vkernels") == [
        "descending", ["100 ms", "20.0 ms", "9.00 ms", "4.00 ms", "3.00 ms", "–"],
    ]  # fmt: skip


def test_words_sort_by_the_keyboard(shown):
    shown.run(f"document.querySelector({json.dumps(heading(shown, 'case'))}).focus()")
    shown.press("Enter", 13)
    assert column(shown, "case") == ["ascending", ["absent", "broken", "even", "fair", "quick", "slow"]]
    shown.press("Enter", 13)
    assert column(shown, "case")[1][0] == "slow"
    assert column(shown, "vkernels")[0] == "none"


def test_rows_are_filtered(shown):
    shown.click("#search")
    shown.type("rearr BF16")
    assert column(shown, "case")[1] == ["even"]
    assert shown.run("document.getElementById('count').textContent") == "1 of 6 rows"
    shown.run("(s => { s.value = ''; s.oninput(); })(document.getElementById('search'))")
    shown.run("(s => { s.value = 'slower'; s.onchange(); })(document.querySelector('select[data-key=result]'))")
    assert column(shown, "case")[1] == ["slow"]


def test_the_theme_follows_the_system_until_it_is_chosen(shown):
    background = "getComputedStyle(document.body).backgroundColor"
    light = shown.run(background)
    shown.click("#theme")
    dark = shown.run(background)
    assert dark != light
    shown.click("#theme")
    assert shown.run(background) == light
    shown.look(1280, dark=True)
    assert shown.run(background) == light, "chosen: light"
    shown.run("document.documentElement.className = ''")
    assert shown.run(background) == dark
    shown.look(1280, dark=True, media="print")
    assert shown.run(background) == light, "paper is white"


def test_marks_say_what_they_are(shown):
    said = "[document.getElementById('tip').classList.contains('on'), document.getElementById('tip').textContent]"
    shown.point("svg.wide[data-chart=ratios-attention] .hit rect")
    expected = "attention: quick · fp32 · forward\n9.00 ms, SDPA 50.0 ms: 12.5× (11.9× to 13.1×)\n50 % of the roofline"
    assert shown.run(said) == [True, expected]
    shown.run("document.querySelector('svg.wide[data-chart=roofline] .hit').focus()")
    on, text = shown.run(said)
    assert on
    assert "GFLOP/s" in text
    shown.press("Escape", 27)
    assert shown.run(said)[0] is False


def test_the_legend_brings_a_series_to_the_front(shown):
    strong = (
        "[...document.querySelectorAll('svg.wide[data-chart=roofline] [data-series].on')].map(m => m.dataset.series)"
    )
    shown.click("svg.wide[data-chart=roofline] .key[data-key=rearrange]")
    assert set(shown.run(strong)) == {"rearrange"}
    shown.click("svg.wide[data-chart=roofline] .key[data-key=rearrange]")
    shown.point("h1")
    assert shown.run(strong) == []


def test_it_prints(shown):
    shown.run("document.querySelector('details').open = false")
    assert shown.pdf().startswith(b"%PDF")
    assert shown.run("document.querySelector('details').open") is False
    shown.look(700, media="print")
    assert shown.run("document.querySelector('svg.wide').checkVisibility()"), "paper has room"


def test_nothing_can_leave_the_page(browser, written):
    """Not even by a script of somebody else: a listener on this machine hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        browser.open(written)
        browser.run(f"document.body.append(Object.assign(new Image(), {{src: '{address}'}}))")
        assert browser.run(f"fetch('{address}').then(() => 'sent', () => 'refused')") == "refused"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_hostile_words_run_nothing(browser, tmp_path):
    path = write(hostile_run(), tmp_path, images=False)
    browser.open(path)
    browser.point(".hit")
    assert browser.run("typeof pwned") == "undefined"
    assert not browser.problems
    assert browser.requests == [path.resolve().as_uri()]


@pytest.mark.parametrize("run", [Run({}), Run(MACHINE, [row()])], ids=["empty", "one row"])
def test_small_runs_have_no_errors(browser, tmp_path, run):
    browser.open(write(run, tmp_path, images=False))
    assert not browser.problems
    assert browser.run("document.querySelectorAll('svg[data-chart=mask]').length") == len(masks.ENTRIES)
