"""The plan of a mask by kernels on the device: the same plan that `vkernels.masks.lower` builds with torch operations.

The host looks at the description only: how many ranges, whether there are row maps, which box columns. Kept tokens and
ids are read by kernels, and by torch's stable sort where tokens have to be put into classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vkernels.library import op
from vkernels.masks import torch_op  # noqa: F401  (registers the overloads)
from vkernels.masks.attributes import upload
from vkernels.masks.description import BLOCKS, IDS, Description, describe
from vkernels.masks.plan import Box, MaskPlan
from vkernels.masks.video_mask import VideoMask


@dataclass(frozen=True)
class _Order:
    """The processing order of queries or keys; None: as they stand, and all of them live."""

    rows: Tensor | None = None
    count: Tensor | None = None
    before: Tensor | None = None  # [p, s + 1], kept tokens before each: where there are no classes
    ladder: Tensor | None = None  # [p, s], ascending codes: where there are


class _Device:
    """One mask's table on one device, and the ops that read it."""

    def __init__(self, mask: VideoMask, what: Description, device: torch.device, backend: str):
        self.what, self.device, self.backend = what, device, backend
        self.p, self.s = mask.samples, mask.tokens
        self.table = what.upload(device)
        sources = (BLOCKS if what.ends else 0) | (IDS if what.ids else 0)
        self.layout = [self.p, self.s, what.most, sources]

    def order(self, keep: Tensor | None) -> _Order:
        keep = None if keep is None else upload(keep, self.device).expand(self.p, -1)
        if self.what.in_order or self.what.plain:
            return _Order() if keep is None else _Order(*op("lower_mask_rows", self.backend)(keep))
        codes = op("lower_mask_codes", self.backend)(*self.table, keep, self.what.codes, self.layout)
        ladder, rows = torch.sort(codes, dim=1, stable=True)
        count = None if keep is None else keep.sum(1, dtype=torch.int32)
        return _Order(rows.to(torch.int32), count, None, ladder)

    def ranges(self, q: _Order, k: _Order) -> Tensor:
        return op("lower_mask_ranges", self.backend)(
            *self.table, q.rows, q.count, k.before, k.ladder, 2 if self.what.globals else 1, self.layout
        )

    def attributes(self, order: _Order) -> tuple[Tensor, Tensor | None]:
        attributes, flags = op("lower_mask_box", self.backend)(
            *self.table, order.rows, len(self.what.bounds), self.what.globals, self.layout
        )
        return attributes, flags if self.what.globals else None


def plan_on_device(mask: VideoMask, device: torch.device, backend: str) -> MaskPlan:
    """Of a mask with at least one token and one sample."""
    what = describe([segment for segment in mask.segments if segment.length])
    here = _Device(mask, what, device, backend)
    q = here.order(mask.keep_q)
    k = q if mask.keep_k is mask.keep_q else here.order(mask.keep_k)
    box = None
    if what.bounds:
        q_attr, q_global = here.attributes(q)
        k_attr, k_global = (q_attr, q_global) if k is q else here.attributes(k)
        box = Box(q_attr, k_attr, what.bounds, q_global, k_global)
    return MaskPlan(
        s_q=here.s,
        s_k=here.s,
        groups=1,
        len_q=here.s,
        len_k=here.s,
        q_rows=q.rows,
        k_rows=k.rows,
        q_count=q.count,
        k_count=k.count,
        ranges=None if what.plain else here.ranges(q, k),
        box=box,
    )
