"""The masks of the gallery: every kind that VideoMask offers, by one rule per entry at any size of grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vkernels.masks import Grid, Text, Video, VideoMask


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
    return VideoMask.pack(
        [VideoMask.frame_causal(Grid(grid.t - short.t, grid.h, grid.w)), VideoMask.causal(short.tokens)]
    )


def _spans(grid: Grid, within: str) -> VideoMask:
    a = Text(_text(grid))
    return VideoMask.spans([a, Video(*grid.shape), a], within=within)


ENTRIES = (
    Entry("Joint", "VideoMask.joint(grid)", "Every token sees every token.", VideoMask.joint),
    Entry("Spatial", "VideoMask.spatial(grid)", "A token sees its own frame.", VideoMask.spatial),
    Entry(
        "Temporal",
        "VideoMask.temporal(grid)",
        "A patch sees itself in the other frames; kernels read each tube as one short sequence, nothing is permuted.",
        VideoMask.temporal,
    ),
    Entry("Causal", "VideoMask.causal(n)", "Itself and earlier tokens.", lambda g: VideoMask.causal(g.tokens)),
    Entry(
        "Frame-causal",
        "VideoMask.frame_causal(grid)",
        "The own frame and all earlier ones.",
        VideoMask.frame_causal,
    ),
    Entry(
        "Frame-causal, sliding",
        "VideoMask.frame_causal(grid, window=2)",
        "The own frame and the one before it.",
        lambda g: VideoMask.frame_causal(g, window=2),
    ),
    Entry(
        "Window",
        "VideoMask.window(grid, (1, 1, 1))",
        "A box around the token: one frame, row and column to every side. CPU kernels skip more of it, by the extent "
        "of each tile.",
        lambda g: VideoMask.window(g, (1, 1, 1)),
    ),
    Entry(
        "Causal along each tube",
        "VideoMask.temporal(grid) & VideoMask.frame_causal(grid)",
        "What both masks allow; & combines any two.",
        lambda g: VideoMask.temporal(g) & VideoMask.frame_causal(g),
    ),
    Entry(
        "Text and video",
        'VideoMask.spans([Text(a), Video(t, h, w), Text(b)], within="video")',
        "Text is causal, a video sees all of itself.",
        lambda g: _spans(g, "video"),
    ),
    Entry(
        "Text and frames",
        'VideoMask.spans([Text(a), Video(t, h, w), Text(b)], within="frame")',
        "Text is causal, a frame sees itself and what came before.",
        lambda g: _spans(g, "frame"),
    ),
    Entry(
        "Several videos",
        "VideoMask.spans([Text(a), video, Text(b), video, Text(c)])",
        "A conversation about two videos.",
        _turns,
    ),
    Entry(
        "Blocks by id",
        "VideoMask.from_block_ids(ids)",
        "Blocks named token by token, as Hugging Face's processors give them; a row map brings interleaved blocks "
        "together.",
        lambda g: VideoMask.from_block_ids(torch.arange(g.tokens) // (g.w // 2) % 4),
    ),
    Entry(
        "Sequences end to end",
        "VideoMask.from_cu_seqlens([0, a, b, n])",
        "Each sees itself only.",
        lambda g: VideoMask.from_cu_seqlens([0, g.tokens * 5 // 16, g.tokens * 3 // 8, g.tokens]),
    ),
    Entry(
        "Packed masks",
        "VideoMask.pack([frame_causal, causal])",
        "Any masks end to end, each with its own rule.",
        _packed,
    ),
    Entry(
        "Dropped tokens",
        "VideoMask.frame_causal(grid).keep(kept, queries=True)",
        "Half of the tokens are gone: kernels visit the others only.",
        lambda g: VideoMask.frame_causal(g).keep(_kept(g), queries=True),
    ),
    Entry(
        "Dropped keys",
        "VideoMask.frame_causal(grid).keep(kept)",
        "Dropped tokens are unseen, and still see.",
        lambda g: VideoMask.frame_causal(g).keep(_kept(g)),
    ),
    Entry(
        "Global tokens",
        "VideoMask.spatial(grid).with_globals(cls=4)",
        "CLS or register tokens in front that see and are seen by all.",
        lambda g: VideoMask.spatial(g).with_globals(cls=4),
    ),
    Entry(
        "Window and CLS",
        "VideoMask.window(grid, (1, 1, 1)).with_globals(cls=1)",
        "A local window with one token that sees the whole video.",
        lambda g: VideoMask.window(g, (1, 1, 1)).with_globals(cls=1),
    ),
)
