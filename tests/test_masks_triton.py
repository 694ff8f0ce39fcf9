"""Mask lowering by kernels, interpreted: the same plan as torch operations build, element by element; what it reads;
what a hostile direct call can do.

Planted bugs that turned a test red: an interval's `hi + 1` and the dropped tokens' place off by one; the compaction's
sum of earlier blocks one block too long; a global's second interval; dropped tokens left in their class when sorting;
a class of `_place` one code narrower than its tokens; the ends of rising ids read from another sample; two relations
whose classes are added; any kept queries taken for the kept keys; ids read past their end; a row map of any length.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from test_masks import WITNESS, masks
from torch.utils._python_dispatch import TorchDispatchMode

import vkernels as vk
from vkernels import NoBackend
from vkernels.masks.attributes import Ids, Position, Relation, Segment, within
from vkernels.testing import guarded_memory, plan_to_dense, poisoned_memory

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted"),
]
M, G = vk.VideoMask, vk.Grid
TENSORS = ("q_rows", "k_rows", "q_count", "k_count", "ranges")


def tensors(plan):
    named = {name: getattr(plan, name) for name in TENSORS}
    if plan.box is not None:
        named |= {name: getattr(plan.box, name) for name in ("q_attr", "k_attr", "q_global", "k_global")}
    return named


def assert_same_plan(mask):
    got, want = mask.plan(backend="triton"), mask.plan()
    for name in ("s_q", "s_k", "groups", "len_q", "len_k", "q_stride", "k_stride"):
        assert getattr(got, name) == getattr(want, name), name
    assert (got.box is None) == (want.box is None)
    if got.box is not None and want.box is not None:
        assert got.box.bounds == want.box.bounds
    theirs = tensors(want)
    for name, a in tensors(got).items():
        b = theirs[name]
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), (name, a, b)
    return got


@pytest.mark.parametrize("name", WITNESS)
def test_witness(name):
    mask, rows = WITNESS[name]
    want = torch.tensor([[int(bit) for bit in row] for row in rows.split()], dtype=torch.bool)
    assert torch.equal(plan_to_dense(assert_same_plan(mask))[0], want)


@settings(max_examples=15)
@given(masks())
def test_plan_is_the_law_and_the_one_of_torch_operations(mask):
    law = mask.dense()
    got = plan_to_dense(assert_same_plan(mask)).expand(mask.samples, -1, -1)
    assert torch.equal(got, law.reshape(mask.samples, *law.shape[-2:]))


@pytest.mark.parametrize("n", [1, 8, 17])
def test_lengths_around_the_tiles(n):
    """Tiles are 16 and 32 tokens here. Relations of every kind: intervals, classes, a leader, boxes, blocks, ids."""
    generator = torch.Generator().manual_seed(n)
    grid = G(n, 1, 2)
    ids = torch.randint(-1, 4, (2, 2 * n), generator=generator)
    rising = M.from_block_ids(ids[0].sort().values)
    keep = torch.rand(2, 2 * n + 1, generator=generator) < 0.6
    cuts = M.from_cu_seqlens([0, n // 3, 2 * n])
    crossed = (M.window(grid, (5, 0, 1)) & cuts & M.from_block_ids(ids)).with_globals(1)
    for mask in (
        M.joint(grid).keep(keep[:, 1:]),
        M.frame_causal(grid, window=9).keep(keep[:, 1:], queries=True),
        M.temporal(grid).keep(keep[:1, 1:]),
        M.window(grid, (2, 0, 1)),
        rising & M.causal(2 * n),
        M.spatial(grid) & M.from_block_ids(ids),
        crossed,
        crossed.keep(keep).keep(keep.flip(1), queries=True),
        M.pack([M.joint(grid).keep(keep[:, 1:]), cuts & M.causal(2 * n), M.causal(0), crossed, rising]),
    ):
        assert_same_plan(mask)


def test_classes_stay_apart():
    """The last token of class 0 and the first code of class 1: one code less per class and they meet."""
    same = Relation(Ids.from_ids(torch.tensor([[0, 1, 0]])), 0, 0)
    until = Relation(Ids.from_ids(torch.tensor([[0, 0, 1]])), *within(None, 0))
    mask = M((Segment(3, (same, until)),))
    assert torch.equal(plan_to_dense(assert_same_plan(mask))[0], mask.dense())


def test_two_relations_make_a_class_of_every_pair():
    """Row 0 column 1 and row 1 column 0 have the same sum."""
    mask = M.temporal(G(2, 2, 2)).keep([True] * 7 + [False])
    assert torch.equal(plan_to_dense(assert_same_plan(mask))[0], mask.dense())


def test_ids_that_rise_differ_by_sample():
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    mask = M.from_block_ids(ids)
    assert torch.equal(plan_to_dense(assert_same_plan(mask)), ids[:, :, None] >= ids[:, None, :])


def test_a_segment_has_its_own_relations_only():
    """One relation, then two: the first segment must not take the second's."""
    mask = M.pack([M.causal(3), M.window(G(2, 1, 2), (0, None, 0))])
    assert torch.equal(plan_to_dense(assert_same_plan(mask))[0], mask.dense())


def test_many_segments_are_found_by_search():
    mask = M.pack([M.causal(1 + i % 3) if i % 2 else M.spans([vk.Text(1), vk.Video(2, 1, 1)]) for i in range(50)])
    plan = assert_same_plan(mask)
    assert plan.q_rows is None
    assert torch.equal(plan_to_dense(plan)[0], mask.dense())


def test_compaction_of_a_long_sample():
    """131,072 tokens in blocks of 1,024, as on a GPU: worked out by sorting."""
    from vkernels.triton.tiles import overridden

    keep = torch.rand(2, 1 << 17, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[1, :70000] = False
    with overridden("_compact_kernel", {"BLOCK": 1024}), overridden("_count_kept_kernel", {"BLOCK": 1024}):
        rows, count, before = torch.ops.vkernels.lower_mask_rows.triton(keep)
    assert torch.equal(rows.long(), torch.sort(~keep, dim=1, stable=True).indices)
    assert torch.equal(count.long(), keep.sum(1))
    assert torch.equal(before[:, 1:].long(), keep.cumsum(1))
    assert not before[:, 0].any()


def test_queries_and_keys_dropped_alike_share_their_row_map():
    plan = M.causal(5).keep([True, False, True, True, False], queries=True).plan(backend="triton")
    assert plan.q_rows is plan.k_rows
    assert plan.q_rows is not None
    assert plan.q_rows.tolist() == [[0, 2, 3, 1, 4]]


class _NothingReadBack(TorchDispatchMode):
    """Refuses every torch operation that would make the host wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "bincount")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


@settings(max_examples=10)
@given(masks())
def test_nothing_is_read_back(mask):
    """The ops' shapes alone make the whole plan, on a device that holds no values."""
    from vkernels.masks.device import plan_on_device

    if not mask.tokens:
        return
    with _NothingReadBack():
        got = plan_on_device(mask, torch.device("meta"), "triton")
        here = plan_on_device(mask, torch.device("cpu"), "triton")
    theirs = tensors(here)
    for name, a in tensors(got).items():
        b = theirs[name]
        assert (a is None) == (b is None), name
        assert a is None or (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta"), name


def test_launches_do_not_depend_on_values():
    from vkernels.triton.launch import recording

    def launched(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-1, 5, (2, 24), generator=generator)
        keep = torch.rand(2, 24, generator=generator) < 0.1 + 0.4 * seed
        block = Ids(Ids.from_ids(ids).keys, monotone=False)
        mask = M((Segment(24, (Relation(block, *within(None, 0)),)),)) & M.temporal(G(6, 2, 2))
        with recording() as noted:
            for each in (mask, M.frame_causal(G(6, 2, 2))):
                each.keep(keep, queries=True).plan(backend="triton")
        return [
            (x.name, x.grid, [v.shape if isinstance(v, torch.Tensor) else v for v in x.arguments.values()])
            for x in noted
        ]

    assert len(launched(0)) == 5  # codes and ranges; counts, compaction and ranges
    assert launched(0) == launched(1) == launched(2)


def python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lengths_do_not_compile_anew():
    """Twenty lengths, twenty numbers of segments and of blocks, one compilation per kernel and form."""
    code = """
import json, torch, vkernels as vk
from vkernels.triton.aot import key
from vkernels.triton.launch import recording
M, forms = vk.VideoMask, {}
def note(form, mask):
    with recording() as noted:
        mask.plan(backend="triton")
    forms.setdefault(form, []).append(sorted(map(key, noted)))
for i, t in enumerate((1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 100, 128, 129, 257, 1000, 1024, 4096)):
    grid = vk.Grid(t, 1, 2)
    keep = torch.zeros(2, grid.tokens, dtype=torch.bool)
    note("keep", M.causal(grid.tokens).keep(keep, queries=True))
    note("frames", M.pack([M.causal(3), M.causal(2 * t)]))
    note("columns", M.pack([M.joint(vk.Grid(2, 1, 2)), M.spatial(vk.Grid(t + 1, 1, 2)).with_globals(1)]))
    note("classes", M.temporal(vk.Grid(2, 2, 1 + t)).keep(torch.zeros(2, 4 * t + 4, dtype=torch.bool)))
    note("blocks", M.from_cu_seqlens([0, *range(1, i + 2), 2 * t + 30]) & M.causal(2 * t + 30))
    note("segments", M.pack([M.causal(2)] * (i + 2)))
    note("ids", M.from_block_ids(torch.tensor([[1, 0] * (t + 3)] * 2)) & M.window(vk.Grid(2, 1, t + 3), (0, 0, 1)))
print(json.dumps({form: [len(keys), len(set(sum(keys, []))), len(keys[0])] for form, keys in forms.items()}))
"""
    for form, (calls, kinds, launched) in json.loads(python(code)).items():
        assert (calls, kinds <= launched) == (20, True), (form, kinds, launched)


def test_refused_where_there_is_no_gpu():
    code = """
import vkernels as vk
try:
    vk.lower_mask(vk.VideoMask.causal(3), backend="triton")
except vk.NoBackend as error:
    print(error)
"""
    assert "lower_mask: backend triton cannot run this call: the tensors are on cpu" in python(code)


def test_refused_in_a_sentence():
    with pytest.raises(ValueError, match="lower_mask: backend must be one of triton, reference, got 'gpu'"):
        vk.lower_mask(M.causal(3), backend="gpu")
    n = 2**13
    blocks = [Relation(Ids.from_ids(torch.arange(n) // (i + 2) % 7 + torch.zeros(1, n)), 0, 0) for i in range(5)]
    wide = M((Segment(n, (*blocks, Relation(Position(n), *within(None, 0)))),))
    with pytest.raises(NoBackend, match=r"lower_mask: backend triton cannot run this call: .* more than 62 bits"):
        wide.plan(backend="triton")
    assert wide.plan().q_rows is not None


def _table(p=1, s=4):
    segments = torch.tensor([[0, 0, s, 0, s, 0, 1, 0]])
    relations = torch.tensor([[0, 0, s, -(2**30), 0, 1, 0, 0]])
    return [segments, relations, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)], [p, s, 1, 0]


def test_a_direct_call_is_the_plan():
    table, layout = _table()
    out = torch.ops.vkernels.lower_mask_ranges.triton(*table, None, None, None, None, 1, layout)
    assert out.tolist() == [[[0, 1], [0, 2], [0, 3], [0, 4]]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, layout: t.__setitem__(0, t[0][:, :5]), r"segments must have shape \(x 8\)"),
        (lambda t, layout: t.__setitem__(1, t[1].int()), "relations must be contiguous torch.int64"),
        (lambda t, layout: t.__setitem__(3, t[3][:0]), "ids must hold at least one element"),
        (lambda t, layout: layout.pop(), "layout must be .samples, tokens, relations, sources."),
        (lambda t, layout: layout.__setitem__(1, -1), "layout must be .samples, tokens, relations, sources."),
    ],
)
def test_a_direct_call_is_refused_before_it_could_read_outside(change, match):
    table, layout = _table()
    change(table, layout)
    with pytest.raises((ValueError, TypeError), match=match):
        torch.ops.vkernels.lower_mask_ranges.triton(*table, None, None, None, None, 1, layout)


def test_a_row_map_of_another_length_is_refused():
    table, layout = _table()
    rows = torch.zeros(1, 3, dtype=torch.int32)
    for call in (
        lambda: torch.ops.vkernels.lower_mask_ranges.triton(*table, rows, None, None, None, 1, layout),
        lambda: torch.ops.vkernels.lower_mask_ranges.triton(*table, None, None, rows, None, 1, layout),
        lambda: torch.ops.vkernels.lower_mask_box.triton(*table, rows, 1, True, layout),
        lambda: torch.ops.vkernels.lower_mask_codes.triton(*table, rows.bool(), 4, layout),
    ):
        with pytest.raises(ValueError, match=r"lower_mask: .* must have shape"):
            call()


@pytest.mark.parametrize("seed", range(8))
def test_hostile_tables_stay_inside(seed):
    """Any numbers in the table and in the row maps: every read and write stays in its tensor, ranges in [0, s]."""
    generator = torch.Generator().manual_seed(seed)
    wild = torch.tensor([-(2**62), -(2**40), -(2**31), -3, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**62])

    def junk(*shape, dtype=torch.int64):
        values = wild[torch.randint(len(wild), shape, generator=generator)]
        return values.clamp(-(2**31), 2**31 - 1).to(dtype) if dtype == torch.int32 else values

    segments, relations = junk(2, 8), junk(2, 8)
    relations[:, 0], relations[:, 1] = torch.arange(2) % 2 + 1, seed % 4
    segments[:, 5], segments[:, 6] = 0, 2
    segments[0, 0] = 0
    table = [segments, relations, junk(3), junk(5, dtype=torch.int32)]
    layout = [1, 5, 2, 3]
    rows, count = junk(1, 5, dtype=torch.int32), junk(1, dtype=torch.int32)
    before, ladder = junk(1, 6, dtype=torch.int32), junk(1, 5)
    ops = torch.ops.vkernels
    with poisoned_memory(), guarded_memory():
        ops.lower_mask_codes.triton(*table, None, 5, layout)
        ops.lower_mask_box.triton(*table, rows, 2, True, layout)
        for places in ((None, None), (before, None), (None, ladder)):
            out = ops.lower_mask_ranges.triton(*table, rows, count, *places, 2, layout)
            assert ((out >= 0) & (out <= 5)).all()


def test_the_first_row_of_every_table_is_pinned():
    from vkernels.triton.tiles import table

    rows = {name: kernel["sm80"][0] for name, kernel in table("lower_mask").items()}
    scan, place = {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 128, "num_warps": 4}
    assert rows == {
        "_count_kept_kernel": scan,
        "_compact_kernel": scan,
        "_codes_kernel": place,
        "_ranges_kernel": {"BLOCK": 256, "num_warps": 8},
        "_box_kernel": place,
    }


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vkernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_opcheck():
    keep = torch.arange(19) % 3 > 0
    with _Recorder() as recorder:
        M.window(G(3, 3, 2), (1, 1, 0)).with_globals(1).keep(keep, queries=True).plan(backend="triton")
        M.temporal(G(3, 3, 2)).with_globals(1).keep(keep).plan(backend="triton")
        M.frame_causal(G(19, 1, 1)).keep(keep).plan(backend="triton")
    assert {func.overloadpacket.__name__ for func, _ in recorder.calls} == {
        f"lower_mask_{part}" for part in ("rows", "codes", "ranges", "box")
    }
    for func, args in dict(recorder.calls).items():
        torch.library.opcheck(func, args)


def test_torch_compile_takes_lowering_whole():
    keep = torch.arange(12) % 3 > 0
    want = M.frame_causal(G(3, 2, 2)).keep(keep).plan()

    def lowered(keep):
        plan = M.frame_causal(G(3, 2, 2)).keep(keep).plan(backend="triton")
        return plan.k_rows, plan.ranges

    torch._dynamo.reset()
    got = torch.compile(lowered, fullgraph=True, backend="aot_eager")(keep)
    for a, b in zip(got, (want.k_rows, want.ranges), strict=True):
        assert torch.equal(a, b)
