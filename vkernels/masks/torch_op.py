"""torch's view of lowering on a device: schemas and fakes. Shapes follow from the description, never from a value."""

from __future__ import annotations

import torch

from vkernels.library import lazily, register

_TRITON = "vkernels.masks.triton"
_MASK = "Tensor segments, Tensor relations, Tensor ends, Tensor ids"


def _rows_fake(keep):
    p, s = keep.shape
    return tuple(keep.new_empty(shape, dtype=torch.int32) for shape in ((p, s), (p,), (p, s + 1)))


def _codes_fake(segments, relations, ends, ids, keep, past, layout):
    return segments.new_empty(layout[0], layout[1])


def _ranges_fake(segments, relations, ends, ids, rows, count, before, ladder, intervals, layout):
    return segments.new_empty(layout[0], layout[1], 2 * intervals, dtype=torch.int32)


def _box_fake(segments, relations, ends, ids, rows, columns, flags, layout):
    p, s = layout[:2]
    attributes = segments.new_empty(p, columns, s, dtype=torch.int32)
    return attributes, segments.new_empty((p, s) if flags else (0,), dtype=torch.uint8)


register(
    "lower_mask_rows",
    "(Tensor keep) -> (Tensor, Tensor, Tensor)",
    fake=_rows_fake,
    backends={"triton": lazily(_TRITON, "compact")},
)
register(
    "lower_mask_codes",
    f"({_MASK}, Tensor? keep, int past, int[] layout) -> Tensor",
    fake=_codes_fake,
    backends={"triton": lazily(_TRITON, "codes")},
)
register(
    "lower_mask_ranges",
    f"({_MASK}, Tensor? rows, Tensor? count, Tensor? before, Tensor? ladder, int intervals, int[] layout) -> Tensor",
    fake=_ranges_fake,
    backends={"triton": lazily(_TRITON, "ranges")},
)
register(
    "lower_mask_box",
    f"({_MASK}, Tensor? rows, int columns, bool flags, int[] layout) -> (Tensor, Tensor)",
    fake=_box_fake,
    backends={"triton": lazily(_TRITON, "box")},
)
