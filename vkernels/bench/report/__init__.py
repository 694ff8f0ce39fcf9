"""A run as a page people look at: index.html, self-contained, and each plot as a PNG.

`python -m vkernels.bench.report RUN.json --out FOLDER` renders stored runs.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from vkernels.bench.report import gallery, png
from vkernels.bench.report.layout import scene
from vkernels.bench.report.page import Figures, page
from vkernels.bench.report.ratios import bars, by_op, overview
from vkernels.bench.report.roofline import roofline
from vkernels.bench.report.scaling import curves
from vkernels.bench.report.stages import stages
from vkernels.bench.results import Run


def write(run: Run, folder: str | Path, images: bool = True) -> Path:
    """Write `folder`/index.html and, with `images` and matplotlib, each plot as <name>-light.png and <name>-dark.png.

    Returns the page's path. Without matplotlib a warning says in a sentence that there are no PNGs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = Figures(
        overview=overview(run.rows),
        ratios=[bars(op, rows) for op, rows in by_op(run.rows).items()],
        roofline=roofline(run),
        curves=curves(run.growth),
        stages=stages(run.stages),
    )
    path = folder / "index.html"
    path.write_text(page(run, figures), encoding="utf-8", errors="replace")
    reason = png.why_not() if images else None
    if reason:
        warnings.warn(reason, stacklevel=2)
    elif images:
        for drawing in (*(scene(chart) for chart in figures.every()), gallery.poster()):
            png.write(drawing, folder)
    return path
