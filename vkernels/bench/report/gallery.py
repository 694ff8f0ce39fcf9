"""Every kind of VideoMask as a picture: who sees whom, from the mask's law, and what a kernel does about it, from the
plan that kernels read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vkernels.bench.report.palette import cycled
from vkernels.bench.report.scene import Item, Rect, Scene, Stroke, Words
from vkernels.masks import Grid, MaskPlan, Text, Video, VideoMask

SMALL, BLOCK = Grid(4, 4, 4), 8  # drawn: 64 video tokens, tiles of 8 x 8
REAL, REAL_BLOCK = Grid(32, 16, 16), 128  # counted: 8,192 video tokens, tiles of 128 x 128
SKIPPED, FULL, MASKED = 0, 1, 2
SIDE, GAP = 160, 18


@dataclass(frozen=True)
class Entry:
    title: str
    code: str
    words: str
    build: Callable[[Grid], VideoMask]


def _text(grid: Grid) -> int:
    """Text tokens beside a video of this grid, as many as most prompts have at the real size."""
    return max(5, grid.tokens // 200)


def _kept(grid: Grid) -> Tensor:
    return torch.rand(grid.tokens, generator=torch.Generator().manual_seed(3)) < 0.5


def _turns(grid: Grid) -> VideoMask:
    a, half = _text(grid), Video(grid.t // 2, grid.h, grid.w)
    return VideoMask.spans([Text(a), half, Text(a), half, Text(a)], within="video")


def _packed(grid: Grid) -> VideoMask:
    short = Grid(max(grid.t // 4, 1), grid.h, grid.w)
    return VideoMask.pack([VideoMask.frame_causal(Grid(grid.t - short.t, grid.h, grid.w)), VideoMask.causal(short.tokens)])


ENTRIES = (
    Entry("Joint", "VideoMask.joint(grid)", "Every token sees every token.", VideoMask.joint),
    Entry("Spatial", "VideoMask.spatial(grid)", "A token sees its own frame.", VideoMask.spatial),
    Entry("Temporal", "VideoMask.temporal(grid)", "A patch sees itself in the other frames; kernels read each tube as one "
          "short sequence, nothing is permuted.", VideoMask.temporal),
    Entry("Causal", "VideoMask.causal(n)", "Itself and earlier tokens.", lambda g: VideoMask.causal(g.tokens)),
    Entry("Frame-causal", "VideoMask.frame_causal(grid)", "The own frame and all earlier ones.", VideoMask.frame_causal),
    Entry("Frame-causal, sliding", "VideoMask.frame_causal(grid, window=2)", "The own frame and the one before it.",
          lambda g: VideoMask.frame_causal(g, window=2)),
    Entry("Window", "VideoMask.window(grid, (1, 1, 1))", "A box in time and space around the token: one frame, row and "
          "column to every side. CPU kernels skip more of it, by the extent of each tile.", lambda g: VideoMask.window(g, (1, 1, 1))),
    Entry("Causal along each tube", "VideoMask.temporal(grid) & VideoMask.frame_causal(grid)",
          "What both masks allow; & combines any two.", lambda g: VideoMask.temporal(g) & VideoMask.frame_causal(g)),
    Entry("Text and video", 'VideoMask.spans([Text(a), Video(t, h, w), Text(b)], within="video")',
          "Text is causal, a video sees all of itself.",
          lambda g: VideoMask.spans([Text(_text(g)), Video(*g.shape), Text(_text(g))], within="video")),
    Entry("Text and frames", 'VideoMask.spans([Text(a), Video(t, h, w), Text(b)], within="frame")',
          "Text is causal, a frame sees itself and what came before.",
          lambda g: VideoMask.spans([Text(_text(g)), Video(*g.shape), Text(_text(g))], within="frame")),
    Entry("Several videos", "VideoMask.spans([Text(a), video, Text(b), video, Text(c)])",
          "A conversation about two videos.", _turns),
    Entry("Blocks by id", "VideoMask.from_block_ids(ids)", "Blocks named token by token, as Hugging Face's processors "
          "give them; interleaved blocks are brought together by a row map.",
          lambda g: VideoMask.from_block_ids(torch.arange(g.tokens) // (g.w // 2) % 4)),
    Entry("Sequences end to end", "VideoMask.from_cu_seqlens([0, a, b, n])", "Each sees itself only.",
          lambda g: VideoMask.from_cu_seqlens([0, g.tokens * 5 // 16, g.tokens * 3 // 8, g.tokens])),
    Entry("Packed masks", "VideoMask.pack([frame_causal, causal])", "Any masks end to end, each with its own rule.", _packed),
    Entry("Dropped tokens", "VideoMask.frame_causal(grid).keep(kept, queries=True)",
          "Half of the tokens are gone: kernels visit the others only.",
          lambda g: VideoMask.frame_causal(g).keep(_kept(g), queries=True)),
    Entry("Dropped keys", "VideoMask.frame_causal(grid).keep(kept)", "Dropped tokens are unseen, and still see.",
          lambda g: VideoMask.frame_causal(g).keep(_kept(g))),
    Entry("Global tokens", "VideoMask.spatial(grid).with_globals(cls=4)", "CLS or register tokens in front that see and "
          "are seen by all.", lambda g: VideoMask.spatial(g).with_globals(cls=4)),
    Entry("Window and CLS", "VideoMask.window(grid, (1, 1, 1)).with_globals(cls=1)", "A local window with one token "
          "that sees the whole video.", lambda g: VideoMask.window(g, (1, 1, 1)).with_globals(cls=1)),
)  # fmt: skip


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
            items.append(Rect(first * size, top * size, (last - first) * size, (q - top) * size, cycled(first // frame)))
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
    for group in range(plan.groups):
        top, left = group * plan.len_q, group * plan.len_k
        for i, line in enumerate(kinds):
            for j, kind in enumerate(line):
                x, y = (left + j * BLOCK) * size, (top + i * BLOCK) * size
                w, h = min(BLOCK, plan.len_k - j * BLOCK) * size, min(BLOCK, plan.len_q - i * BLOCK) * size
                if kind != SKIPPED:
                    items.append(Rect(x, y, w, h, "ours" if kind == FULL else "masked", "card"))
                if kind == MASKED:
                    items.append(Stroke(((x + 1, y + h - 1), (x + w - 1, y + 1)), "hatch", 1.0))
    return tuple(items)


def counted(entry: Entry) -> str:
    """The drawn tiles, and what the same mask is at a real size."""
    drawn = entry.build(SMALL).plan()
    kinds, groups = tiles(drawn, BLOCK), drawn.groups
    run, coded = groups * int((kinds != SKIPPED).sum()), groups * int((kinds == MASKED).sum())
    mask = entry.build(REAL)
    skipped, full, masked = (_percent(share) for share in shares(mask.plan(), REAL_BLOCK))
    return (
        f"{run} tiles run here, {coded} of them with mask code. At {mask.tokens:,} tokens {skipped} of all pairs are "
        f"skipped, {full} run without mask code, {masked} with."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share in (0, 1) or 0.1 <= share <= 0.9 else 1}f} %"


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
    for x, colour, edge, text in ((0, "ours", "card", "tile without mask code"), (210, "masked", "card", "tile with mask code"),
                                  (400, "bg", "axis", "never visited")):  # fmt: skip
        items += [Rect(x, y - 10, 12, 12, colour, edge), Words(x + 18, y, text)]
    note = f"left: visible pairs (rows are queries); right: tiles of {BLOCK} x {BLOCK} as kernels visit them"
    items.append(Words(columns * width - 26, y, note, anchor="end"))
    return Scene("masks", "VideoMask: who sees whom, and what a kernel skips", columns * width - 26, y + 8, tuple(items))
