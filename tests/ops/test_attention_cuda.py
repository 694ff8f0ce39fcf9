"""What only the CUDA kernels of attention can get wrong, emulated: tile borders, runs of key blocks, lists of query
blocks, packed groups, row maps, hostile indices. Expectations come pair by pair from the words of a mask plan
(test_attention.py), in float64, or are worked by hand.

Planted in csrc/attention/ one at a time and seen red here. The ring: no barrier before a tile is used, a copy waited
for one too late, keys not committed. Products: weights of neighbouring keys exchanged, sums not rescaled to a new
maximum, the sign of a negative scale. Masks: the key at an interval's end seen, the core begun a block early or ended a
block late, a block of queries called full by its starts alone, one key too few for a tile of keys to be met. Rows: rows
of this step's keys written over by the next, a key past the interval copied, the key head of all heads the first,
intervals of queries noted over those in use, packed groups offset by the wrong length, counts and row maps left
unclamped. Lists: votes of other warps not counted, a list written before the last one was read, only the first query
head of a group walked, its lse for all of them. Borders: outputs, lse and gradients of dropped tokens taken from the
core, the sign of dlse, delta of a query that saw nothing. Windows: attributes of two steps where three are in use, of
step 0 not noted, of a second word or a later part taken from the first, of the other side's length, of one sample for
all, past the keys; bounds not turned for keys, the last relation or the 32nd column left out, global rows or columns
forgotten, an index not inside its group, the interval not applied or applied to the wrong word, rows of another warp or
half, blocks of queries called full, lanes that decide alone, nothing skipped, values mixed where nothing was weighed.
Blind to a missing warp barrier before bits are read: the vote that follows it is a meeting here, too.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import pairs_of, plans

import vkernels
from vkernels import Grid, MaskPlan, NoBackend, VideoMask, attention, library
from vkernels.masks import Box
from vkernels.ops.attention.torch_op import mask_arguments
from vkernels.testing import guarded_memory, poisoned_memory

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

FWD, BWD = torch.ops.vkernels.attention_fwd.cuda, torch.ops.vkernels.attention_bwd.cuda
ERROR = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # of values of about 1


def inputs(plan, b, n, m, d, dtype=torch.float16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(b, s, heads, d, generator=g).to(dtype)
        for s, heads in ((plan.s_q, n), (plan.s_k, m), (plan.s_k, m), (plan.s_q, n))
    )
    return q, k, v, dout, torch.randn(b, n, plan.s_q, generator=g)


def dense(plan, b):
    visible, seen = pairs_of(plan), torch.zeros(b, plan.s_q, plan.s_k, dtype=torch.bool)
    for sample in range(b):
        for i in range(plan.s_q):
            seen[sample, i, visible(sample, i)] = True
    return seen


def truth(q, k, v, seen, scale):
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    hidden = ~seen[:, None]
    scores = torch.einsum("bsnd,btnd->bnst", q, k).mul(scale).masked_fill(hidden, -math.inf)
    blind = hidden.all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(hidden, 0.0)
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), -1).masked_fill(blind[..., 0], -math.inf)
    return torch.einsum("bnst,btnd->bsnd", weights, v), lse


def run(q, k, v, dout, dlse, plan, scale, backend="cuda"):
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*x, mask=plan, scale=scale, return_lse=True, backend=backend)
    through = torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))
    return out, lse, *torch.autograd.grad([out, through], x, [dout, dlse.to(lse.dtype)])


def check(plan, b=1, n=2, m=1, d=64, dtype=torch.float16, scale=0.2, seed=0):
    q, k, v, dout, dlse = inputs(plan, b, n, m, d, dtype, seed)
    got = run(q, k, v, dout, dlse, plan, scale)
    x = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = truth(*x, dense(plan, b), scale)
    through = torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))
    want = out, lse, *torch.autograd.grad([out, through], x, [dout.double(), dlse.double()])
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=2e-6)
    for name, g, w in zip(("out", "dq", "dk", "dv"), (got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        bound = ERROR[dtype] * max(1.0, float(w.detach().abs().max()))
        torch.testing.assert_close(g.double(), w, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
    return got


def whole(s_q, s_k):
    return MaskPlan(s_q, s_k, 1, s_q, s_k)


def test_two_keys_worked_by_hand():
    """Scores ln 3 and 0, so probabilities 3/4 and 1/4; 1.0986 in float16 is ln 3 to 5e-4."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    q[..., 0], k[0, 0, 0, 0], v[0, 0, 0, 0], v[0, 1, 0, 1] = 1.0, math.log(3.0), 4.0, 8.0
    q, k, v = (x.half().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, scale=1.0, return_lse=True, backend="cuda")
    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(out[0, 0, 0, :3].float(), torch.tensor([3.0, 2.0, 0.0]), **near)
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(4.0)]), **near)
    dq, dk, dv = torch.autograd.grad(out[..., 0].sum() + lse.sum(), (q, k, v))
    torch.testing.assert_close(dq[0, 0, 0, :2].float(), torch.tensor([1.5 * math.log(3.0), 0.0]), **near)
    torch.testing.assert_close(dk[0, :, 0, 0].float(), torch.tensor([1.5, -0.5]), **near)
    torch.testing.assert_close(dv[0, :, 0, 0].float(), torch.tensor([0.75, 0.25]), **near)


@pytest.mark.parametrize(("s_q", "s_k"), [(1, 64), (63, 1), (64, 65), (127, 63), (129, 129), (65, 257)])
def test_lengths_around_every_tile(s_q, s_k):
    check(whole(s_q, s_k))


@pytest.mark.parametrize("d", [8, 56, 72, 80, 88, 96, 104, 128])
def test_head_sizes(d):
    check(whole(70, 67), n=1, d=d, dtype=torch.float16 if d % 16 else torch.bfloat16)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 30.0])
def test_scales(scale):
    """The softmax wants a positive one; at 30 a row is one key."""
    plan = VideoMask.causal(40).plan("cpu")
    q, k, v, *_ = inputs(plan, 1, 1, 1, 64)
    out, lse = attention(q, k, v, mask=plan, scale=scale, return_lse=True, backend="cuda")
    want, want_lse = truth(q.double(), k.double(), v.double(), dense(plan, 1), scale)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=4e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-5)
    if abs(scale) < 1:
        check(plan, n=1, scale=scale)


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_intervals_around_every_tile(shift, d):
    """Starts and ends cross blocks of 64 one key earlier or later; the first tile of queries has edges on both sides of
    a core, two queries see nothing, the last tile is all core."""
    i = torch.arange(150)
    ranges = torch.stack([i // 4 + shift + 2, i // 3 + 127 + shift], -1).clamp(max=200)
    ranges[20:22] = 7
    ranges[128:] = torch.tensor([64 + shift, 192])
    check(MaskPlan(150, 200, 1, 150, 200, ranges=ranges[None].int()), n=1, d=d)


@pytest.mark.parametrize("intervals", [2, 3])
def test_several_intervals(intervals):
    i = torch.arange(140)[:, None]
    starts = torch.tensor([0, 70, 150])[:intervals] + i // 8
    ranges = torch.stack([starts, starts + torch.tensor([3, 66, 20])[:intervals]], -1).flatten(1).clamp(max=180)
    check(MaskPlan(140, 180, 1, 140, 180, ranges=ranges[None].int()), n=1)


def test_one_key_of_a_tile():
    """Every query ends at key 129: of the second tile of 128 it sees one."""
    check(MaskPlan(70, 140, 1, 70, 140, ranges=torch.tensor([0, 129]).int().expand(1, 70, 2).contiguous()), n=1)


def test_heads_in_groups():
    check(whole(33, 17), b=2, n=4, m=2, d=16)


def test_more_blocks_of_queries_than_a_list_holds():
    """128 blocks of 64 queries are listed at a time, 32 by each warp."""
    check(whole(8200, 8), n=1)


def test_nothing_comes_back_through_a_query_that_saw_nothing():
    """Whatever gradient arrives at its lse, which is -inf."""
    plan = MaskPlan(4, 8, 1, 4, 8, ranges=torch.tensor([[0, 8], [3, 3], [2, 4], [8, 8]]).int()[None])
    q, k, v, dout, dlse = inputs(plan, 1, 1, 1, 64)
    out, lse = FWD(*direct(q, k, v, plan))
    dlse[0, 0, [1, 3]] = math.nan
    for grad in BWD(dout, dlse, q, k, v, out, lse, *direct(q, k, v, plan)[3:]):
        assert torch.isfinite(grad).all()


@given(drawn=plans(), heads=st.sampled_from([(1, 1), (2, 1)]), d=st.sampled_from([16, 72]))
@settings(max_examples=12)
def test_any_plan_equals_the_oracle(drawn, heads, d):
    b, plan = drawn
    if plan.s_q and plan.s_k:
        check(plan, b, *heads, d)


def band(s_q, s_k, lo, hi, **more):
    """A box of one relation on positions, with a line of zeros after it."""
    q_attr, k_attr = (torch.stack([torch.arange(s), torch.zeros(s)])[None].int() for s in (s_q, s_k))
    return MaskPlan(s_q, s_k, 1, s_q, s_k, box=Box(q_attr, k_attr, ((lo, hi), (0, 0))), **more)


@pytest.mark.parametrize(("d", "lo", "hi"), [(64, -1, 1), (64, 31, 33), (72, -64, -62), (96, -33, 0), (128, 30, 70)])
def test_windows_around_every_tile(d, lo, hi):
    """Bands start and end around 32 and 64 keys and queries; some queries see nothing, some tiles meet nothing."""
    check(band(150, 170, lo, hi), n=1, d=d, dtype=torch.bfloat16 if d == 96 else torch.float16)


def test_eight_relations_each_of_which_decides():
    """Relation a hides what differs by more than 8 in the a-th of eight attributes, which are the same elsewhere."""
    q_attr, k_attr = torch.zeros(1, 8, 80).int(), torch.zeros(1, 8, 72).int()
    for a in range(8):
        q_attr[0, a, 10 * a : 10 * a + 10], k_attr[0, a, 9 * a : 9 * a + 9] = 5, -5 if a % 2 else 15
    bounds = tuple((-8, 12) if a % 2 else (-12, 8) for a in range(8))
    check(MaskPlan(80, 72, 1, 80, 72, box=Box(q_attr, k_attr, bounds)), n=1, d=16)


def test_a_box_inside_intervals_with_tokens_that_skip_it():
    """Two intervals a query; of each side three tokens see, or are seen, wherever the intervals allow it."""
    i = torch.arange(140)[:, None]
    ranges = torch.cat([i // 8, i // 8 + 40, i // 8 + 70, i // 8 + 150], 1).clamp(max=170)
    flags = [torch.zeros(1, s, dtype=torch.uint8) for s in (140, 170)]
    flags[0][0, [0, 63, 139]], flags[1][0, [1, 64, 169]] = 1, 1
    plan = band(140, 170, -20, 9, ranges=ranges[None].int())
    box = Box(plan.box.q_attr, plan.box.k_attr, plan.box.bounds, *flags)
    check(MaskPlan(140, 170, 1, 140, 170, ranges=plan.ranges, box=box), n=1)


def test_a_window_of_dropped_tokens_and_grouped_heads():
    keep = torch.rand(2, 147, generator=torch.Generator().manual_seed(5)) < 0.7
    mask = VideoMask.window(Grid(3, 7, 7), (1, 2, 3)).keep(keep, queries=True)
    check(mask.plan("cpu"), b=2, n=2, m=1, d=40)


def test_packed_groups_keep_their_box():
    q_attr, k_attr = torch.tensor([[[0, 1, 2, 3, 4]]]).int(), torch.tensor([[[4, 2, 0]]]).int()
    globals_ = torch.tensor([[0, 0, 1, 0, 0]]).byte(), torch.tensor([[0, 1, 0]]).byte()
    box = Box(q_attr, k_attr, ((-1, 1),), *globals_)
    check(MaskPlan(175, 105, 35, 5, 3, (1, 35), (3, 1), box=box), n=1)


def test_where_a_window_hides_a_whole_product_nothing_is_multiplied():
    """Of 6 x 4 products of 32 queries with 64 keys, a band of one key a query leaves 6. The emulator counts."""

    def switches(hi):
        plan = band(192, 256, -hi, hi)
        q, k, v, *_ = inputs(plan, 1, 1, 1, 64)
        before = library.emulator.module.switches()
        attention(q, k, v, mask=plan, backend="cuda")
        return library.emulator.module.switches() - before

    assert switches(0) < 0.5 * switches(1000)


@pytest.mark.parametrize(("frames", "d"), [(1, 64), (3, 64), (63, 64), (65, 64), (31, 80), (33, 80)])
def test_groups_share_tiles(frames, d):
    """Up to 64 tokens (forward) and 32 or 64 (backward) groups lie end to end in a tile."""
    check(VideoMask.temporal(Grid(frames, 1, 5)).plan("cpu"), n=1, d=d)


def test_packed_groups_keep_their_intervals():
    ranges = torch.tensor([[0, 1], [0, 2], [1, 3], [5, 5], [2, 5]], dtype=torch.int32)[None]
    check(MaskPlan(175, 175, 35, 5, 5, (1, 35), (5, 1), ranges=ranges), n=1)
    check(MaskPlan(175, 105, 35, 5, 3, (1, 35), (3, 1)), n=1)


@pytest.mark.parametrize("mask", [VideoMask.frame_causal, VideoMask.joint], ids=["frame_causal", "joint"])
def test_dropped_tokens_are_not_looked_at(mask):
    """Their rows hold NaN. Their outputs and gradients are 0, their lse -inf."""
    keep = torch.rand(2, 150, generator=torch.Generator().manual_seed(5)) < 0.5
    plan = mask(Grid(6, 5, 5)).keep(keep, queries=True).plan("cpu")
    want = check(plan, b=2)
    q, k, v, dout, dlse = inputs(plan, 2, 2, 1, 64)
    for x in (q, k, v, dout):
        x[~keep] = math.nan
    got = run(q, k, v, dout, dlse, plan, 0.2)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    for x in (got[0], *got[2:]):
        assert not x[~keep].any()
    assert torch.isneginf(got[1].transpose(1, 2)[~keep]).all()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_bits_do_not_depend_on_the_order_of_threads(order):
    plan = VideoMask.frame_causal(Grid(3, 3, 8)).plan("cpu")
    call = inputs(plan, 1, 2, 1, 72)
    want = run(*call, plan, 0.2)
    library.emulator.module.set_order(order)
    try:
        got = run(*call, plan, 0.2)
    finally:
        library.emulator.module.set_order(3)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_strides_alignment_and_guards():
    """Views of a packed tensor as they are, rows at odd addresses through a copy: the same bits."""
    plan = whole(34, 34)
    q, k, v, dout, dlse = inputs(plan, 2, 2, 1, 72)
    want = run(q, k, v, dout, dlse, plan, 0.2)
    packed = torch.cat([q, k, v], 2)
    views = packed[:, :, :2], packed[:, :, 2:3], packed[:, :, 3:]
    odd = torch.zeros(2, 34, 2, 75, dtype=q.dtype)[..., 3:]
    odd.copy_(dout)
    with poisoned_memory(), guarded_memory():
        for grad in (odd, dout.transpose(1, 2).contiguous().transpose(1, 2)):
            got = run(*views, grad, dlse.transpose(1, 2).contiguous().transpose(1, 2), plan, 0.2)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    short = dout[..., :1].expand_as(dout)  # an expanded gradient
    got = run(q, k, v, short, dlse, plan, 0.2)
    assert all(torch.equal(g, w) for g, w in zip(got, run(q, k, v, short.clone(), dlse, plan, 0.2), strict=True))


FAR = 2**31 - 1


@pytest.mark.parametrize("value", [-FAR - 1, -1, 3, 2**30, FAR])
def test_values_nobody_can_look_at_before_the_launch(value):
    """Whatever row maps, counts and intervals hold: no address outside the call, and no NaN where rows are written."""
    q, k, v, dout, dlse = inputs(whole(70, 70), 1, 1, 1, 64)
    rows = torch.full((1, 70), value, dtype=torch.int32)
    count = torch.full((1,), value, dtype=torch.int32)
    ranges = torch.full((1, 70, 4), value, dtype=torch.int32)
    ranges[:, ::2, 1::2] = 70 - value if abs(value) < 70 else ~value
    order = torch.arange(70, dtype=torch.int32)[None]
    for given_ in (
        {"q_rows": rows, "k_rows": rows},
        {"q_rows": order, "k_rows": order, "q_count": count, "k_count": count},
        {"ranges": ranges},
    ):
        plan = MaskPlan(70, 70, 1, 70, 70, **given_)
        out = run(q, k, v, dout, dlse, plan, 0.2)
        if "ranges" in given_ or "q_count" in given_:
            assert all(torch.isfinite(x).all() for x in (out[0], *out[2:]))
    packed = MaskPlan(70, 70, 14, 5, 5, (5, 1), (5, 1), ranges=ranges[:, :5])
    assert all(torch.isfinite(x).all() for x in run(q, k, v, dout, dlse, packed, 0.2)[2:])


LINE = torch.zeros(1, 1, 4, dtype=torch.int32)


def direct(q, k, v, plan=None):
    return [q, k, v, 0.3, *mask_arguments(plan, q.shape[1], k.shape[1])]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(1, 4, 2, 64)}, "q must have dtype bfloat16, float16|k must have dtype"),
        ({1: torch.zeros(1, 4, 1, 72).half()}, "k must have size 64 in dimension 3"),
        ({4: [1, 4, 5, 0, 1, 0, 1]}, "layout must cover every token row exactly once"),
        ({4: [4, 1, 4, 1, 1, 1, 1]}, "layout must cover every token row exactly once"),
        ({5: torch.zeros(1, 3, dtype=torch.int32)}, "q_rows must have size 4 in dimension 1"),
        ({7: torch.zeros(1, dtype=torch.int32)}, "q_count must come with q_rows"),
        ({9: torch.zeros(1, 4, 8, dtype=torch.int32)}, "ranges must hold 1 to 3 intervals per query"),
        ({9: torch.zeros(3, 4, 2, dtype=torch.int32)}, "ranges must have batch 1 or b"),
        ({10: torch.zeros(1, 1, 4, dtype=torch.int32)}, "k_attr must be given with q_attr"),
        ({10: LINE, 11: LINE, 12: [0, 0, 0]}, "bounds must hold a pair per attribute"),
        ({10: LINE, 11: LINE[..., :3], 12: [0, 0]}, "k_attr must have size 4 in dimension 2"),
        ({10: LINE, 11: LINE, 12: [0, 0], 13: LINE[0, :, :3].byte()}, "q_global must have size 4 in dimension 1"),
    ],
)
def test_a_direct_call_is_refused_before_it_could_read_outside(change, match):
    q, k = torch.zeros(1, 4, 2, 64).half(), torch.zeros(1, 4, 1, 64).half()
    arguments = direct(q, k, k)
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=f"attention: ({match})"):
        FWD(*arguments)
    out, lse = torch.zeros_like(arguments[0]), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=f"attention: ({match})"):
        BWD(out, None, *arguments[:3], out, lse, *arguments[3:])


def test_rows_in_vectors_and_room_to_work_are_checked():
    x, lse = torch.zeros(1, 4, 2, 64).half(), torch.zeros(1, 2, 4)
    layout, nothing = [1, 4, 4, 0, 1, 0, 1], [None] * 9
    odd = torch.zeros(1, 4, 2, 66).half()[..., 1:65]
    with pytest.raises(ValueError, match="attention: k must lie at 16-byte addresses, row by row"):
        library.run_cuda("attention_cuda", [x, odd, x, x, lse, *nothing], 0.3, layout, [])
    small = torch.zeros(15)
    tensors = [x, None, x, x, x, x, lse, x, x, x, small, None, *nothing]
    with pytest.raises(ValueError, match="attention: stats must hold 16 elements, got 15"):
        library.run_cuda("attention_backward_cuda", tensors, 0.3, layout, [])


def test_what_is_left_to_others_in_sentences():
    def told(d=64, dtype=torch.bfloat16, **how):
        q = torch.zeros(1, 6, 1, d, dtype=dtype)
        with pytest.raises(NoBackend) as error:
            attention(q, q, q, backend="cuda", **how)
        return str(error.value)

    assert "float32 has no tensor cores of its precision" in told(dtype=torch.float32)
    assert "the head size is 136, this backend serves multiples of 8 up to 128" in told(d=136)
    assert "the head size is 60, this backend" in told(d=60)


def test_compiled_whole_and_registered_well():
    plan = VideoMask.frame_causal(Grid(3, 2, 2)).plan("cpu")
    q, k, v, *_ = inputs(plan, 1, 2, 1, 64)
    want = attention(q, k, v, mask=plan, backend="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: attention(*x, mask=plan, backend="cuda"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), want)
    torch.library.opcheck(FWD, tuple(direct(q, k, v, plan)))
    told = str(vkernels.explain("attention", q, k, v, mask=plan, backend="cuda"))
    assert told.splitlines()[0] == "attention: backend cuda"


@pytest.mark.parametrize(
    ("tiles", "lines", "heads", "groups", "section"), [(5, 12, 3, 2, 4), (3, 7, 7, 1, 3), (1, 1, 1, 1, 1)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_every_tile_is_computed_once_longest_first(tiles, lines, heads, groups, section, backward):
    place = library.emulator.module.place_of
    places = [place(tiles, lines, heads, groups, section, backward, block) for block in range(tiles * lines)]
    samples = lines // heads // groups
    everything = [
        (t, h, g, s) for t in range(tiles) for h in range(heads) for g in range(groups) for s in range(samples)
    ]
    assert sorted(places) == sorted(everything)
    of_section = [t for t, *_ in places[: tiles * section]]
    assert of_section == sorted(of_section, reverse=backward)
