"""Evidence for lower_mask. It has kernels but no dtype and no native code, so it is no op of vkernels/ops; its laws
are in tests/test_masks.py and tests/test_masks_triton.py."""

from __future__ import annotations

import torch

from vkernels.masks import Grid, VideoMask, lower_mask
from vkernels.masks.lower import BACKENDS, Call, prepare
from vkernels.spec import Case, Cost, Maker, OpSpec, Shape

_VIDEO = Grid(32, 16, 16)  # 8,192 tokens
_LONG = Grid(512, 16, 16)  # 131,072


def _mask(mask: VideoMask) -> dict:
    return {"mask": mask}


def _ids(m: Maker, grid: Grid) -> dict:
    steps = torch.arange(grid.tokens, dtype=torch.int64) * 37 % 64
    return _mask(VideoMask.from_block_ids(steps[None].expand(2, -1)) & VideoMask.temporal(grid))


def _cost(call: Call) -> Cost:
    """A keep byte read, a row and an interval written, per token."""
    return Cost(flop=0.0, bytes=max(1.0, 13.0 * call.mask.tokens * call.mask.samples))


_INT = (torch.int32,)

SPEC = OpSpec(
    name="lower_mask",
    fn=lower_mask,
    prepare=prepare,
    backends=BACKENDS,
    cases=[Case("frame_causal", lambda m: _mask(VideoMask.frame_causal(Grid(2, 2, 2))))],
    shapes=[
        Shape("causal_frames", lambda m: _mask(VideoMask.frame_causal(_LONG)), "a decoder of 131,072 tokens", _INT),
        Shape(
            "packed_cls",
            lambda m: _mask((VideoMask.from_cu_seqlens([0, 4096, 8192]) & VideoMask.causal(8192)).with_globals(1)),
            "two videos packed, one CLS token",
            _INT,
        ),
        Shape(
            "keep_temporal",
            lambda m: _mask(VideoMask.temporal(_VIDEO).keep(m.rand_bool(8, _VIDEO.tokens), queries=True)),
            "temporal adapter, half of the tokens dropped",
            _INT,
        ),
        Shape(
            "keep_frames",
            lambda m: _mask(VideoMask.frame_causal(_VIDEO).keep(m.rand_bool(8, _VIDEO.tokens), queries=True)),
            "frame-causal, half of the tokens dropped",
            _INT,
        ),
        Shape("window", lambda m: _mask(VideoMask.window(_VIDEO, (2, 4, 4)).with_globals(1)), "local 3-D window", _INT),
        Shape("block_ids", lambda m: _ids(m, _VIDEO), "blocks named by ids", _INT),
    ],
    rejects=[],
    cost=_cost,
    source="this library",
)
