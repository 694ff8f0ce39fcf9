"""Attention split over keys: every split leaves its part, and the last one to finish joins them, in one launch.

A part is, per query row, the largest score, the sum of weights and the unnormalised output. They are joined in the
order of the splits whoever comes last, so results do not depend on timing.
"""

import triton
import triton.language as tl

from vkernels.triton.softmax import finite_or_zero, natural_lse, normalise


@triton.jit
def part_rows(split, splits, R: tl.constexpr):
    """Rows [R] of the workspace where `split` of this program's queries leaves its part, and how many there are."""
    rows = tl.num_programs(0).to(tl.int64) * splits * R
    return (tl.program_id(0).to(tl.int64) * splits + split) * R + tl.arange(0, R), rows


@triton.jit
def leave_part(
    part_ptr, split, splits, live, top, total, acc, first, D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr
):
    """Store a part, or its columns from `first` on."""
    mine, rows = part_rows(split, splits, R)
    column = first + tl.arange(0, COLUMNS)
    inside = (live & (total != 0.0))[:, None] & (column < D)[None, :]
    tl.store(part_ptr + (mine * D)[:, None] + column[None, :], acc, mask=inside)
    tl.store(part_ptr + rows * D + mine, top)
    tl.store(part_ptr + rows * (D + 1) + mine, total)


@triton.jit
def is_last(counter_ptr, splits):
    """Whether every other split of these queries has left its part, and this program may read them.

    PTX memory model: the stores of all threads happen before the barrier's end, hence before the one thread's atomic,
    which releases them to the GPU (a release is cumulative); whoever reads the counter it wrote acquires them, and the
    broadcast of the ticket carries that to all threads of the reading program. The last one leaves the counter at 0.
    """
    tl.debug_barrier()
    counter = counter_ptr + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


@triton.jit
def join(o_ptr, lse_ptr, part_ptr, o_at, lse_at, live, used, splits, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr):
    """Output and lse of these queries from the first `used` parts. What a part without weight holds was never written.

    As many columns at a time as leave registers for four parts under way: the loads of one hide behind the others.
    """
    C: tl.constexpr = A if R * A <= 2048 else 2048 // R
    for first in range(0, D, C):
        top = tl.full([R], float("-inf"), tl.float32)
        total = tl.zeros([R], tl.float32)
        acc = tl.zeros([R, C], tl.float32)
        column = first + tl.arange(0, C)
        inside = live[:, None] & (column < D)[None, :]
        for split in tl.range(0, used, loop_unroll_factor=4):
            at, rows = part_rows(split, splits, R)
            their_top = tl.load(part_ptr + rows * D + at, mask=live, other=float("-inf"))
            their_total = tl.load(part_ptr + rows * (D + 1) + at, mask=live, other=0.0)
            theirs = tl.load(part_ptr + (at * D)[:, None] + column[None, :], mask=inside, other=0.0)
            holds = their_total != 0.0
            new_top = tl.maximum(top, their_top)
            base = finite_or_zero(new_top)
            keep, weight = tl.exp2(top - base), tl.exp2(their_top - base)
            top, total = new_top, total * keep + tl.where(holds, their_total * weight, 0.0)
            acc = acc * keep[:, None] + tl.where(holds[:, None], theirs * weight[:, None], 0.0)
        o = normalise(acc, total).to(o_ptr.dtype.element_ty)
        tl.store(o_ptr + o_at[:, None] + column[None, :], o, mask=inside)
        tl.store(lse_ptr + lse_at, natural_lse(top, total), mask=live)
