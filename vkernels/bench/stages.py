"""Stages of models other packages bring along: whole calls, plain beside ours over the same weights."""

from __future__ import annotations

from importlib.metadata import entry_points

from vkernels.bench.results import Stage

GROUP = "vkernels.bench.stages"  # entry points: functions (match, seconds) that yield a Stage, or what was wrong


def line(stage: Stage) -> str:
    short = " *" if stage.target and stage.ratio < stage.target else ""
    memory = f"{stage.ours_mb:,.0f} against {stage.plain_mb:,.0f} MB" if stage.ours_mb and stage.plain_mb else ""
    spread = f"{stage.ratio:.2f}x  {stage.ratio_p20:.2f} to {stage.ratio_p80:.2f}"
    return f"{stage.stage:85} {stage.dtype:9} {spread}  {memory}{short}"


def stages(found: list[Stage], match: str, seconds: float) -> list[str]:
    """Measures every stage whose name holds `match` into `found`; sentences about what was wrong."""
    failures: list[str] = []
    known = list(entry_points(group=GROUP))
    if not known:
        failures.append("no package brings stages along; the reference model's come with vkernels_video")
    for point in known:
        for made in point.load()(match, seconds):
            if isinstance(made, str):
                failures.append(made)
            else:
                found.append(made)
                print(line(made), flush=True)
    return failures
