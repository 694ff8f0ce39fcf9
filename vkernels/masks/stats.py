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


def _live(plan: MaskPlan, p: int) -> tuple[int, int]:
    """Queries and keys of sample p that are not dropped."""
    counts = ((plan.q_count, plan.len_q), (plan.k_count, plan.len_k))
    live_q, live_k = (length if x is None else int(x[min(p, x.shape[0] - 1)]) for x, length in counts)
    return live_q, live_k


def visible_pairs(plan: MaskPlan) -> float:
    """Pairs a sample of the plan leaves visible, on average; O(N) except where a window is compared pair by pair."""
    samples, visible = _samples(plan), 0
    if plan.box is not None:
        return measure(plan, 128).visible / samples
    for p in range(samples):
        live_q, live_k = _live(plan, p)
        if plan.ranges is None:
            visible += live_q * live_k
        else:
            ends = plan.ranges[min(p, plan.ranges.shape[0] - 1), :live_q].clamp(0, live_k).long()
            visible += int((ends[:, 1::2] - ends[:, ::2]).clamp_min(0).sum())
    return visible * plan.groups / samples


def measure(plan: MaskPlan, block: int) -> MaskStats:
    """O(block * N) memory: one strip of queries at a time."""
    columns = torch.arange(plan.len_k)
    samples = _samples(plan)
    visible = empty = partial = full = 0
    edges = torch.arange(0, plan.len_k, block)
    for p in range(samples):
        live_q, live_k = _live(plan, p)
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
