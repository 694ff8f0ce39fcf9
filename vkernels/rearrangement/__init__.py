"""Plans of token rearrangement: what `vkernels.rearrange` runs. docs/rearrange.md says which builder serves whom."""

from vkernels.rearrangement.assembly import assemble, pack, rows_of, scatter_rows
from vkernels.rearrangement.layout import (
    crop,
    deal_clips,
    frames,
    from_einops,
    interleave_clips,
    merge_order,
    pixel_shuffle,
    pixel_unshuffle,
    spatial,
    spatial_back,
    temporal,
    temporal_back,
    tiles_to_canvas,
    window,
)
from vkernels.rearrangement.plan import RearrangePlan, csr, gather
from vkernels.rearrangement.pooling import adaptive_pool, frame_mean, newline, pair_mean, pool, pos_embed
from vkernels.rearrangement.selection import clusters, global_local, keep, local_frames, pad, tome, unpad

__all__ = [
    "RearrangePlan",
    "adaptive_pool",
    "assemble",
    "clusters",
    "crop",
    "csr",
    "deal_clips",
    "frame_mean",
    "frames",
    "from_einops",
    "gather",
    "global_local",
    "interleave_clips",
    "keep",
    "local_frames",
    "merge_order",
    "newline",
    "pack",
    "pad",
    "pair_mean",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pool",
    "pos_embed",
    "rows_of",
    "scatter_rows",
    "spatial",
    "spatial_back",
    "temporal",
    "temporal_back",
    "tiles_to_canvas",
    "tome",
    "unpad",
    "window",
]
