"""VideoMask and its lowering: hand-worked masks, the plan expanded pair by pair against the law, and refusals.

Planted bugs that turned a test red: `hi + 1` of an interval, `rank - 1` of the compaction and the second run of
`k_tiles` off by one; the globals range left out; a class of `_code` one code narrower than its tokens.
"""

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vkernels as vk
from vkernels.masks.attributes import Ids, Relation, Segment, within
from vkernels.masks.stats import visible_pairs
from vkernels.testing import plan_to_dense

M, G = vk.VideoMask, vk.Grid

WITNESS = {
    "joint": (M.joint(G(1, 1, 2)), "11 11"),
    "spatial": (M.spatial(G(2, 1, 2)), "1100 1100 0011 0011"),
    "temporal": (M.temporal(G(2, 1, 2)), "1010 0101 1010 0101"),
    "frame_causal": (M.frame_causal(G(2, 1, 2)), "1100 1100 1111 1111"),
    "frame_causal window": (M.frame_causal(G(3, 1, 1), window=2), "100 110 011"),
    "causal": (M.causal(3), "100 110 111"),
    "window row": (M.window(G(1, 3, 1), (0, 1, 0)), "110 111 011"),
    "window col": (M.window(G(2, 1, 2), (0, None, 0)), "1000 0100 0010 0001"),
    "window free t": (M.window(G(2, 1, 2), (None, 0, 0)), "1010 0101 1010 0101"),
    "spans video": (M.spans([vk.Text(1), vk.Video(2, 1, 1), vk.Text(1)]), "1000 1110 1110 1111"),
    "spans frame": (M.spans([vk.Text(1), vk.Video(2, 1, 1)], within="frame"), "100 110 111"),
    "spans token": (M.spans([vk.Video(1, 1, 3)], within="token"), "100 110 111"),
    "block ids": (M.from_block_ids([-1, 0, 0, -1]), "1000 1110 1110 1111"),
    "block ids apart": (M.from_block_ids([7, 3, 7]), "101 111 101"),
    "cu_seqlens": (M.from_cu_seqlens([0, 1, 1, 3]), "100 011 011"),
    "globals": (M.spatial(G(2, 1, 1)).with_globals(1), "111 110 101"),
    "keep": (M.causal(3).keep([True, False, True]), "100 100 101"),
    "keep queries": (M.causal(3).keep([True, False, True], queries=True), "100 000 101"),
    "nothing": (M.joint(G(1, 1, 2)).keep([False, False]), "00 00"),
    "pack": (M.pack([M.causal(2), M.joint(G(1, 1, 1))]), "100 110 001"),
    "classes stay apart": (M.spatial(G(2, 1, 1)) & M.from_block_ids([1, 0]), "10 01"),
    "classes stay apart wide": (M.spatial(G(3, 1, 1)) & M.from_block_ids([2, 1, 0]), "100 010 001"),
    "and": (M.from_cu_seqlens([0, 2, 3]) & M.causal(3), "100 110 001"),
}


@pytest.mark.parametrize("name", WITNESS)
def test_witness(name):
    mask, rows = WITNESS[name]
    want = torch.tensor([[int(bit) for bit in row] for row in rows.split()], dtype=torch.bool)
    assert torch.equal(mask.dense(), want)
    assert torch.equal(plan_to_dense(mask.plan())[0], want)


@st.composite
def masks(draw, depth=2, tokens=None, batch=2):
    sizes = st.integers(1, 4)
    grid = G(draw(st.integers(0, 4)), draw(sizes), draw(sizes))
    n = grid.tokens
    reach = st.one_of(st.none(), st.integers(0, 2))

    def one():
        kind = draw(st.integers(0, 7))
        if kind == 6:
            p = draw(st.sampled_from([1, batch]))
            ids = [[draw(st.integers(-1, 3)) for _ in range(n)] for _ in range(p)]
            return M.from_block_ids(torch.tensor(ids, dtype=torch.int64).reshape(p, n))
        if kind == 7:
            cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
            return M.from_cu_seqlens([0, *cuts, n])
        return (
            lambda: M.joint(grid),
            lambda: M.spatial(grid),
            lambda: M.temporal(grid),
            lambda: M.frame_causal(grid, draw(st.one_of(st.none(), st.integers(1, 3)))),
            lambda: M.causal(n),
            lambda: M.window(grid, (draw(reach), draw(reach), draw(reach))),
        )[kind]()

    mask = one()
    for _ in range(draw(st.integers(0, 2))):
        other = one()
        both = mask & other
        assert torch.equal(both.dense(), mask.dense() & other.dense())
        mask = both
    if draw(st.booleans()):
        mask = mask.with_globals(draw(st.integers(0, 2)))
    if draw(st.booleans()):
        p = draw(st.sampled_from([1, batch]))
        bits = [[draw(st.booleans()) for _ in range(mask.tokens)] for _ in range(p)]
        keep = torch.tensor(bits, dtype=torch.bool).reshape(p, mask.tokens)
        mask = mask.keep(keep, queries=draw(st.booleans()))
    if depth and draw(st.integers(0, 3)) == 0:
        mask = M.pack([mask, draw(masks(depth=depth - 1))])
    return mask


@given(masks())
def test_plan_is_the_law(mask):
    plan, law = mask.plan(), mask.dense()
    assert torch.equal(plan_to_dense(plan).expand(mask.samples, -1, -1), law.reshape(mask.samples, *law.shape[-2:]))
    assert mask.stats(4).visible == int(law.sum())
    assert visible_pairs(mask.plan("cpu"))[0] == int(law.sum())
    again = M.from_dict(json.loads(json.dumps(mask.to_dict())))
    assert again == mask
    assert hash(again) == hash(mask)
    assert repr(again) == repr(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask


@given(masks())
def test_lowering_reads_nothing_back(mask):
    """On a device without values every read of one raises: what is built there took no synchronisation, and has the
    shapes of the plan a CPU builds."""
    plan, here = mask.plan("meta"), mask.plan()
    assert (plan.groups, plan.len_q, plan.len_k) == (here.groups, here.len_q, here.len_k)
    for name in ("q_rows", "k_rows", "q_count", "k_count", "ranges"):
        a, b = getattr(plan, name), getattr(here, name)
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.device.type == "meta")
    for tiles in ("tiles", "k_tiles"):
        a, b = getattr(plan, tiles)(16), getattr(here, tiles)(16)
        assert a is None if b is None else a.shape == b.shape


def test_a_keep_on_the_device_is_not_read_either():
    keep = torch.empty(2, 12, dtype=torch.bool, device="meta")
    plan = M.frame_causal(G(3, 2, 2)).keep(keep, queries=True).plan("meta")
    assert plan.q_rows is not None
    assert plan.q_rows.shape == (2, 12)


def test_classes_stay_apart():
    """The last token of class 0 and the first code of class 1: one code less per class and they meet."""
    same = Relation(Ids.from_ids(torch.tensor([[0, 1, 0]])), 0, 0)
    until = Relation(Ids.from_ids(torch.tensor([[0, 0, 1]])), *within(None, 0))
    mask = M((Segment(3, (same, until)),))
    want = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert torch.equal(mask.dense(), want)
    assert torch.equal(plan_to_dense(mask.plan())[0], want)


@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_the_tiles(n):
    """Every generator of one length, alone, crossed, with globals, packed and with tokens dropped."""
    generator = torch.Generator().manual_seed(n)
    grid = G(n, 1, 1)
    ids = torch.randint(-1, 4, (n,), generator=generator)
    keep = torch.rand(2, n + 1, generator=generator) < 0.6
    cuts = M.from_cu_seqlens([0, n // 3, n])
    crossed = (M.window(grid, (5, 0, 0)) & cuts & M.from_block_ids(ids)).with_globals(1)
    for mask in (
        M.causal(n),
        M.frame_causal(grid, window=9),
        M.spatial(grid) & M.from_block_ids(ids),
        crossed,
        crossed.keep(keep, queries=True),
        M.pack([M.joint(grid).keep(keep[:, 1:]), cuts & M.causal(n), M.causal(0)]),
    ):
        law = mask.dense()
        assert torch.equal(
            plan_to_dense(mask.plan()).expand(mask.samples, -1, -1), law.reshape(mask.samples, *law.shape[-2:])
        )


@given(masks(), st.integers(1, 7))
def test_tiles_bound_their_rows(mask, block):
    plan = mask.plan()
    if plan.ranges is None:
        assert plan.tiles(block) is None
        return
    tiles, back = plan.tiles(block), plan.k_tiles(block)
    first = torch.full(back.shape[:2], plan.len_q)
    last = torch.zeros(back.shape[:2], dtype=torch.int64)
    for p in range(plan.ranges.shape[0]):
        live = plan.len_q if plan.q_count is None else int(plan.q_count[p])
        for i in range(live):
            for r, (start, end) in enumerate(plan.ranges[p, i].view(-1, 2).tolist()):
                low, core, core_end, high = tiles[p, i // block, r].tolist()
                assert start == end or low <= start <= end <= high
                assert core >= core_end or start <= core < core_end <= end
                for key in range(start, end):
                    first[p, key // block] = min(int(first[p, key // block]), i)
                    last[p, key // block] = max(int(last[p, key // block]), i + 1)
    unseen = last == 0
    assert torch.equal(back[..., 0].long(), first.masked_fill(unseen, 0))
    assert torch.equal(back[..., 1].long(), last)


def test_common_masks_need_no_row_map():
    grid = G(3, 2, 2)
    spans = M.spans([vk.Text(3), vk.Video(2, 2, 2)])
    packed = M.pack([M.causal(3), M.frame_causal(grid)])
    for mask in (
        M.frame_causal(grid),
        M.causal(5),
        spans,
        packed,
        M.window(grid, (1, 1, 1)),
        M.from_cu_seqlens([0, 3]),
    ):
        assert mask.plan().q_rows is None
        assert mask.plan().k_rows is None
    assert M.temporal(grid).plan().groups == 4
    assert M.temporal(grid).plan().q_stride == (1, 4)
    assert M.spatial(grid).plan().q_stride == (4, 1)


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["frame_causal", "temporal_keep", "window"])
def test_memory_grows_with_tokens(kind):
    def largest(t):
        grid = G(t, 8, 8)
        make = {"frame_causal": M.frame_causal, "temporal_keep": M.temporal, "window": lambda g: M.window(g, (1, 1, 1))}
        mask = make[kind](grid)
        if kind == "temporal_keep":
            mask = mask.keep(torch.rand(grid.tokens) < 0.5, queries=True)
        with _Largest() as mode:
            mask.plan()
        return mode.elements

    assert largest(64) <= 4 * largest(16) + 64


REFUSED = {
    "grid": (lambda: M.joint(3), "joint: grid must be a Grid"),
    "axis": (lambda: G(-1, 2, 2), "Grid: t must be at least 0, got -1"),
    "window": (lambda: M.window(G(1, 1, 1), (-1, 0, 0)), "window: t must be at least 0"),
    "frames": (lambda: M.frame_causal(G(1, 1, 1), 0), "frame_causal: window must be at least 1"),
    "keep": (lambda: M.causal(3).keep([True]), "keep: keep must have shape .* s=3"),
    "keep dtype": (lambda: M.causal(1).keep([1.0]), "keep: keep must be bool"),
    "ids": (lambda: M.from_block_ids([0.5]), "from_block_ids: ids must be integers"),
    "cu start": (lambda: M.from_cu_seqlens([1, 2]), "from_cu_seqlens: cu must start at 0"),
    "cu order": (lambda: M.from_cu_seqlens([0, 3, 2]), "from_cu_seqlens: cu must never decrease"),
    "within": (lambda: M.spans([], within="row"), "spans: within must be one of"),
    "globals": (lambda: M.causal(1).with_globals(-1), "with_globals: cls must be at least 0"),
    "and": (lambda: M.causal(2) & M.causal(3), "&: masks must have as many tokens"),
    "and globals": (lambda: M.causal(2).with_globals() & M.causal(3), "&: masks must have the same segments"),
    "and grids": (lambda: M.spatial(G(2, 3, 2)) & M.temporal(G(3, 2, 2)), "&: masks must have the same grid"),
    "set": (lambda: setattr(M.causal(2), "keep_k", None), "a mask is a value"),
    "lower": (lambda: vk.lower_mask(3), "lower_mask: mask must be a VideoMask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name):
    call, match = REFUSED[name]
    with pytest.raises((ValueError, TypeError, AttributeError), match=match):
        call()
