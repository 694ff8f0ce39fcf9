"""Every kind of VideoMask as a picture: who sees whom, from the mask's law, and what a kernel does about it, from the
plan that kernels read."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vkernels.bench.report.masks import ENTRIES, Entry
from vkernels.bench.report.palette import cycled
from vkernels.bench.report.scene import Item, Rect, Scene, Stroke, Words
from vkernels.masks import Grid, MaskPlan, VideoMask

SMALL, BLOCK = Grid(4, 4, 4), 8  # drawn: 64 video tokens, tiles of 8 x 8
REAL, REAL_BLOCK = Grid(32, 16, 16), 128  # counted: 8,192 video tokens, tiles of 128 x 128
SKIPPED, FULL, MASKED = 0, 1, 2
SIDE, GAP = 160, 18


def tiles(plan: MaskPlan, block: int) -> Tensor:
    """SKIPPED, FULL or MASKED for each tile of `block` queries x `block` keys of one group, as int [q tiles, k tiles].

    As the kernels decide it: keys outside an interval of any query of the tile are not visited; keys that every query
    of the tile sees run without mask code; a box is compared wherever it is visited. Of the first sample.
    """
    live_q = plan.len_q if plan.q_count is None else int(plan.q_count[0])
    live_k = plan.len_k if plan.k_count is None else int(plan.k_count[0])
    first_q = torch.arange(0, plan.len_q, block)[:, None]
    first_k = torch.arange(0, plan.len_k, block)[None]
    last_k = (first_k + block).clamp_max(live_k)
    alive = (first_q < live_q) & (first_k < live_k)
    bounds = plan.tiles(block)
    if bounds is None:
        seen = core = alive
    else:
        low, core_low, core_high, high = bounds[0].unbind(-1)  # [q tiles, R] each
        seen = alive & ((low[..., None] < last_k) & (high[..., None] > first_k) & (low < high)[..., None]).any(1)
        core = seen & ((core_low[..., None] <= first_k) & (core_high[..., None] >= last_k)).any(1)
    if plan.box is not None:
        core = torch.zeros_like(core)
    return torch.where(core, FULL, torch.where(seen, MASKED, SKIPPED))


def shares(plan: MaskPlan, block: int) -> tuple[float, float, float]:
    """(never visited, without mask code, with mask code) as shares of all pairs."""
    kinds = tiles(plan, block)
    heights = (plan.len_q - torch.arange(0, plan.len_q, block)).clamp_max(block)
    widths = (plan.len_k - torch.arange(0, plan.len_k, block)).clamp_max(block)
    areas = heights[:, None] * widths[None]
    pairs = max(1, plan.s_q * plan.s_k)
    full, masked = (plan.groups * int(areas[kinds == kind].sum()) / pairs for kind in (FULL, MASKED))
    return max(0.0, 1 - full - masked), full, masked


def pictured(entry: Entry) -> Scene:
    """The pattern on the left, the tiles on the right."""
    mask = entry.build(SMALL)
    items = (*_pattern(mask), *Scene("", "", 0, 0, _tiled(mask.plan())).moved(SIDE + GAP, 0))
    return Scene("mask", f"{entry.title}: pattern and tiles", 2 * SIDE + GAP, SIDE + 1, items)


def _pattern(mask: VideoMask) -> tuple[Item, ...]:
    """Visible pairs; equal runs of keys in queries one under the other are one rectangle. A colour per 16 keys."""
    size = SIDE / mask.tokens
    frame = SMALL.h * SMALL.w
    items: list[Item] = [Rect(0, 0, SIDE, SIDE, "bg", "line")]
    begun: dict[tuple[int, int], int] = {}  # a run of keys: the query that saw it first
    lines = [_runs(row, frame) for row in mask.dense().tolist()]
    for q, runs in enumerate([*lines, set()]):
        for run in begun.keys() - runs:
            first, last, top = *run, begun.pop(run)
            items.append(
                Rect(first * size, top * size, (last - first) * size, (q - top) * size, cycled(first // frame))
            )
        begun |= {run: q for run in runs - begun.keys()}
    return tuple(items)


def _runs(row: list[bool], frame: int) -> set[tuple[int, int]]:
    """[first, past last) of the visible keys that lie side by side in a frame."""
    edges = [k for k in range(len(row) + 1) if k % frame == 0 or k == len(row) or row[k] != row[k - 1]]
    return {(a, b) for a, b in pairwise(edges) if row[a]}


def _tiled(plan: MaskPlan) -> tuple[Item, ...]:
    """Tiles in the order kernels read the tokens: groups one after another along the diagonal."""
    kinds = tiles(plan, BLOCK).tolist()
    size = SIDE / max(plan.s_q, plan.s_k, 1)
    items: list[Item] = [Rect(0, 0, SIDE, SIDE, "bg", "line")]
    hatch: list[Item] = []
    for group in range(plan.groups):
        top, left = group * plan.len_q, group * plan.len_k
        for i, line in enumerate(kinds):
            for j, kind in enumerate(line):
                x, y = (left + j * BLOCK) * size, (top + i * BLOCK) * size
                w, h = min(BLOCK, plan.len_k - j * BLOCK) * size, min(BLOCK, plan.len_q - i * BLOCK) * size
                if kind != SKIPPED:
                    items.append(Rect(x, y, w, h, "ours" if kind == FULL else "masked", "card"))
                if kind == MASKED:
                    hatch.append(Stroke(((x + 1, y + h - 1), (x + w - 1, y + 1)), "hatch", 1.0))
    return (*items, *hatch)


def counted(entry: Entry) -> str:
    """The drawn tiles, and what the same mask is at a real size."""
    drawn = entry.build(SMALL).plan()
    kinds, groups = tiles(drawn, BLOCK), drawn.groups
    run, coded = groups * int((kinds != SKIPPED).sum()), groups * int((kinds == MASKED).sum())
    mask = entry.build(REAL)
    skipped, full, masked = (_percent(share) for share in shares(mask.plan(), REAL_BLOCK))
    return (
        f"Here {run} tiles run, {coded} of them with mask code. At {mask.tokens:,} tokens: {skipped} of the pairs "
        f"skipped, {full} plain, {masked} with mask code."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share in (0, 1) or 0.1 <= share <= 0.9 else 1}f}\u00a0%"


def poster(columns: int = 3) -> Scene:
    """All of them in one picture."""
    width, height = 2 * SIDE + GAP + 26, SIDE + 54
    items: list[Item] = []
    for index, entry in enumerate(ENTRIES):
        x, y = index % columns * width, index // columns * height
        items.append(Words(x, y + 12, entry.title, "ink", 13, bold=True))
        items += pictured(entry).moved(x, y + 22)
    rows = -(-len(ENTRIES) // columns)
    y = rows * height + 4
    legend = (
        (0, "ours", "tile without mask code"),
        (210, "masked", "tile with mask code"),
        (400, "bg", "never visited"),
    )
    for x, colour, text in legend:
        items += [Rect(x, y - 10, 12, 12, colour, "axis"), Words(x + 18, y, text)]
    note = f"left: visible pairs (rows are queries); right: tiles of {BLOCK} x {BLOCK} as kernels visit them"
    items.append(Words(columns * width - 26, y, note, anchor="end"))
    return Scene(
        "masks", "VideoMask: who sees whom, and what a kernel skips", columns * width - 26, y + 8, tuple(items)
    )
