"""A MaskPlan spelled out pair by pair: the oracle lowering is judged against. Plain loops."""

from __future__ import annotations

import torch

from vkernels.masks.plan import MaskPlan


def plan_to_dense(plan: MaskPlan) -> torch.Tensor:
    """bool [p, s_q, s_k]: who sees whom when a kernel follows `plan`."""
    tensors = [x for x in (plan.q_rows, plan.k_rows, plan.ranges) if x is not None]
    samples = max([x.shape[0] for x in tensors], default=1)
    dense = torch.zeros((samples, plan.s_q, plan.s_k), dtype=torch.bool)
    for p in range(samples):
        for g in range(plan.groups):
            live_q = plan.len_q if plan.q_count is None else int(plan.q_count[p])
            live_k = plan.len_k if plan.k_count is None else int(plan.k_count[p])
            for i in range(live_q):
                q = g * plan.q_stride[0] + i * plan.q_stride[1] if plan.q_rows is None else int(plan.q_rows[p, i])
                spans = [(0, live_k)]
                if plan.ranges is not None:
                    ends = plan.ranges[p, i].tolist()
                    spans = list(zip(ends[::2], ends[1::2], strict=True))
                    flat = [0, *ends, live_k]
                    assert flat == sorted(flat), f"ranges of query {i} overlap, descend or leave the live keys: {flat}"
                for first, last in spans:
                    for j in range(first, last):
                        if not _in_box(plan, p, i, j):
                            continue
                        k = (
                            g * plan.k_stride[0] + j * plan.k_stride[1]
                            if plan.k_rows is None
                            else int(plan.k_rows[p, j])
                        )
                        assert not dense[p, q, k], f"query {q} meets key {k} twice"
                        dense[p, q, k] = True
    return dense


def _in_box(plan: MaskPlan, p: int, i: int, j: int) -> bool:
    box = plan.box
    if box is None:
        return True
    if box.q_global is not None and box.k_global is not None and (box.q_global[p, i] or box.k_global[p, j]):
        return True
    gaps = [int(box.k_attr[p, a, j]) - int(box.q_attr[p, a, i]) for a in range(len(box.bounds))]
    return all(lo <= gap <= hi for gap, (lo, hi) in zip(gaps, box.bounds, strict=True))
