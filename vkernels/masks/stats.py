"""How much of a mask is visible, and how much of it a tiled kernel can skip or run without a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vkernels.masks.plan import MaskPlan


@dataclass(frozen=True)
class MaskStats:
    """Counts over one sample, or over all samples of a mask that differs by sample; tiles in processing order."""

    pairs: int
    visible: int
    block: int
    empty: int
    partial: int
    full: int

    @property
    def fraction(self) -> float:
        return self.visible / self.pairs if self.pairs else 0.0

    def __str__(self) -> str:
        return (
            f"{self.visible:,} of {self.pairs:,} pairs visible ({self.fraction:.1%}); "
            f"tiles of {self.block} x {self.block}: {self.empty:,} empty, {self.partial:,} partial, {self.full:,} full"
        )


def _samples(plan: MaskPlan) -> int:
    return max([x.shape[0] for x in (plan.ranges, plan.q_rows, plan.k_rows) if x is not None], default=1)


def _live(count: torch.Tensor | None, sample: int, length: int) -> int:
    return length if count is None else int(count[min(sample, count.shape[0] - 1)])


def visible_pairs(plan: MaskPlan) -> tuple[int, int]:
    """Visible pairs over the samples the plan tells apart, and how many samples those are; O(N) without a box."""
    samples = _samples(plan)
    if plan.box is not None:
        return measure(plan, 128).visible, samples
    total = 0
    for p in range(samples):
        live_q, live_k = _live(plan.q_count, p, plan.len_q), _live(plan.k_count, p, plan.len_k)
        if plan.ranges is None:
            total += live_q * live_k
        else:
            spans = plan.ranges[min(p, plan.ranges.shape[0] - 1), :live_q].unflatten(-1, (-1, 2)).clamp_max(live_k)
            total += int((spans[..., 1] - spans[..., 0]).sum())
    return total * plan.groups, samples


def measure(plan: MaskPlan, block: int) -> MaskStats:
    """O(block * N) memory: one strip of queries at a time."""
    columns = torch.arange(plan.len_k)
    samples = _samples(plan)
    visible = empty = partial = full = 0
    edges = torch.arange(0, plan.len_k, block)
    for p in range(samples):
        live_q, live_k = _live(plan.q_count, p, plan.len_q), _live(plan.k_count, p, plan.len_k)
        for top in range(0, plan.len_q, block):
            rows = slice(top, min(top + block, plan.len_q))
            height = max(min(rows.stop, live_q) - top, 0)
            seen = (columns < live_k).expand(height, -1)
            if plan.ranges is not None:
                pairs = plan.ranges[p, rows][:height].view(height, plan.ranges.shape[2] // 2, 2, 1)
                seen = seen & ((columns >= pairs[:, :, 0]) & (columns < pairs[:, :, 1])).any(1)
            if plan.box is not None:
                close = torch.ones_like(seen)
                for a, (lo, hi) in enumerate(plan.box.bounds):
                    gap = plan.box.k_attr[p, a] - plan.box.q_attr[p, a, rows][:height, None]
                    close &= (gap >= lo) & (gap <= hi)
                if plan.box.q_global is not None and plan.box.k_global is not None:
                    close |= plan.box.q_global[p, rows][:height, None].bool() | plan.box.k_global[p].bool()
                seen = seen & close
            counts = torch.nn.functional.pad(seen.sum(0), (0, -plan.len_k % block)).view(-1, block).sum(1)
            areas = (rows.stop - top) * (plan.len_k - edges).clamp_max(block)
            visible += int(counts.sum())
            empty += int((counts == 0).sum())
            full += int((counts == areas).sum())
            partial += int(((counts > 0) & (counts < areas)).sum())
    g = plan.groups
    return MaskStats(plan.s_q * plan.s_k * samples, visible * g, block, empty * g, partial * g, full * g)
