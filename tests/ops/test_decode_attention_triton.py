"""decode_attention on Triton, interpreted: what the tests derived from the spec do not look at.

The interpreter's tiles are small (16 tokens, two steps to a split), so that a few hundred tokens make many splits.

Trusted after mutation, each planted alone and red here: a causal end, a window or the start of a ring off by one; the
group a window cuts into left out; the turn of a ring one token late; a page number or a length not clamped; splits that
share too few tiles; planes of codes in another order, words in the wrong rows, codes not centred, the bias of zeros or
the rescaling of a part forgotten; queries not brought below 1; the sums of parts not rescaled, one part too few joined,
a counter not put back; rows that take another head's queries.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch

import vkernels as vk
from vkernels.library import INTERPRETED

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
ROWS, CODES = "_decode_rows_kernel", "_decode_codes_kernel"


def filled(scheme, b, m, d, length, dtype=torch.float32, **options):
    options = {"capacity": max(length, 1), **options}
    cache = vk.KVCache(scheme, b=b, m=m, d=d, dtype=dtype, **options)
    k, v = (torch.randn(b, length, m, d).to(cache.dtype) for _ in "kv")
    return cache.append(k, v, backend="cpu")


def direct(q, cache, window=0, scale=None, **changes):
    """The registered operator, past every check of the public function."""
    at = {"length": cache.lengths, "table": cache.table, "layout": cache.layout.ints(), **changes}
    storage = changes.get("storage", cache.tensors())
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    run = torch.ops.vkernels.decode_attention.triton
    return run(q, at["length"], at["table"], *storage, scale, window, at["layout"])


def agrees(q, cache, rtol=1e-5, atol=2e-6, **options):
    got = vk.decode_attention(q, cache, return_lse=True, backend="triton", **options)
    want = vk.decode_attention(q, cache, return_lse=True, backend="reference", **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)
    return got


@interpreted
def test_three_tokens_worked_by_hand():
    cache = vk.KVCache("fp32", b=1, m=1, d=8, capacity=3)
    k, v = torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 8)
    k[0, :, 0, 0] = torch.tensor([0.0, math.log(3.0), math.log(4.0)])
    v[0, :, 0, 0] = torch.tensor([8.0, 0.0, 16.0])
    q = torch.zeros(1, 2, 1, 8)
    q[..., 0] = 1.0
    o, lse = vk.decode_attention(q, cache.append(k, v), scale=1.0, return_lse=True, backend="triton")
    # Weights 1 : 3 for the query before last, 1 : 3 : 4 for the last.
    torch.testing.assert_close(o[0, :, 0, 0], torch.tensor([2.0, 9.0]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([math.log(4.0), math.log(8.0)]))


@interpreted
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 127, 128, 129])
def test_tiles_and_splits_end_anywhere(length):
    torch.manual_seed(length)
    agrees(torch.randn(1, 1, 2, 16), filled("fp32", 1, 1, 16, length, capacity=129))


@interpreted
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("group", "d"), [(32, 16), (32, 72), (64, 40), (64, 128), (128, 24), (128, 256)])
def test_every_shape_of_a_word_tile(bits, group, d):
    """Few words (each in several rows), many words, part of a word, part of a group of channels."""
    torch.manual_seed(bits * group + d)
    cache = filled(f"int{bits}", 1, 1, d, 2 * group + 5, group=group, residual=0)
    agrees(torch.randn(1, 1, 2, d), cache)


@interpreted
@pytest.mark.parametrize("length", [31, 32, 63, 64, 65, 95, 96, 97, 191, 192, 200])
def test_groups_move_from_recent_to_coded(length):
    torch.manual_seed(length)
    cache = filled("int4", 1, 1, 16, length, capacity=200, group=32, residual=32, sinks=2)
    agrees(torch.randn(1, 2, 2, 16), cache)


@interpreted
@pytest.mark.parametrize("window", [None, 1, 2, 33, 70, 1000])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("fp32", {"page": 12}),
        ("fp32", {"ring": True, "capacity": 50, "sinks": 3}),
        ("int4", {"group": 32, "residual": 32, "page": 32}),
        ("int8", {"group": 32, "residual": 0, "ring": True, "capacity": 64, "sinks": 3}),
    ],
    ids=["paged", "ring", "coded-paged", "coded-ring"],
)
def test_windows_over_every_store(scheme, options, window):
    torch.manual_seed(0)
    cache = filled(scheme, 2, 1, 16, 141, **options)
    agrees(torch.randn(2, 3, 2, 16), cache, window=window)


@interpreted
@pytest.mark.parametrize("scheme", ["fp32", "int2"])
def test_a_ring_at_every_place_it_can_be_cut(scheme):
    cache = vk.KVCache(scheme, b=1, m=1, d=16, capacity=64, ring=True, group=32, residual=None, dtype=torch.float32)
    torch.manual_seed(0)
    for count in (60, 3, 1, 1, 30, 40, 64, 17):
        cache.append(torch.randn(1, count, 1, 16), torch.randn(1, count, 1, 16), backend="cpu")
        agrees(torch.randn(1, 1, 1, 16), cache)


@interpreted
@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_sinks_before_there_is_a_history(scheme, length):
    cache = filled(scheme, 1, 1, 16, length, capacity=64, ring=True, sinks=3, group=32, residual=0)
    agrees(torch.randn(1, 1, 1, 16), cache)


@interpreted
@pytest.mark.parametrize(("n", "s"), [(1, 1), (17, 1), (6, 3), (5, 8)])
def test_more_rows_than_a_tile(n, s):
    """17, 18 and 40 rows share their keys over tiles of 16."""
    torch.manual_seed(n)
    for scheme in ("fp32", "int8"):
        agrees(torch.randn(2, s, 2 * n, 16), filled(scheme, 2, 2, 16, 70, group=32, residual=0))


@interpreted
@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_sequences_of_every_length_side_by_side(scheme):
    """An empty one, one shorter than the queries, one within the residual, a long one."""
    torch.manual_seed(0)
    cache = vk.KVCache(scheme, b=4, m=1, d=16, capacity=130, group=32, residual=0, dtype=torch.float32)
    k, v = torch.randn(4, 130, 1, 16), torch.randn(4, 130, 1, 16)
    cache.append(k, v, count=torch.tensor([0, 2, 31, 130]), backend="cpu")
    o, lse = agrees(torch.randn(4, 4, 2, 16), cache)
    assert torch.equal(o[0], torch.zeros(4, 2, 16))
    assert torch.isinf(lse[0]).all()
    assert torch.isinf(lse[1, :, :2]).all()
    assert torch.isfinite(lse[1, :, 2:]).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_queries_meet_codes_to_eleven_bits(dtype):
    """The factors of codes are float16 below 1 whatever the queries are: the lse is as good as float16 makes it."""
    torch.manual_seed(0)
    cache = filled("int4", 1, 1, 64, 256, dtype, group=64, residual=0)
    q = (100 * torch.randn(1, 1, 2, 64)).to(dtype)
    _, lse = vk.decode_attention(q, cache, scale=1 / 800, return_lse=True, backend="triton")
    _, want = vk.decode_attention(q, cache, scale=1 / 800, return_lse=True, backend="reference")
    assert (lse - want).abs().max() < 5e-4


@interpreted
@pytest.mark.parametrize("bits", [8, 2])
def test_the_largest_keys_and_values_do_not_overflow(bits):
    k = torch.zeros(1, 32, 1, 16)
    k[0, ::2], k[0, 1::2] = 61440.0, -61440.0
    cache = vk.KVCache(f"int{bits}", b=1, m=1, d=16, capacity=32, group=32, residual=0, dtype=torch.bfloat16)
    cache.append(k.bfloat16(), k.bfloat16(), backend="cpu")
    q = torch.full((1, 1, 1, 16), 1e3, dtype=torch.bfloat16)  # times delta beyond float16
    got = vk.decode_attention(q, cache, scale=1e-9, backend="triton")
    want = vk.decode_attention(q, cache, scale=1e-9, backend="reference")
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=61440 * 2e-2)


@interpreted
@pytest.mark.parametrize("scheme", ["bf16", "int4"])
def test_queries_of_another_dtype_than_the_cache(scheme):
    torch.manual_seed(0)
    cache = filled(scheme, 1, 1, 16, 80, torch.float16, group=32, residual=0)
    agrees(torch.randn(1, 1, 2, 16), cache)
    q = torch.randn(1, 1, 2, 16, dtype=torch.float16 if scheme == "bf16" else torch.bfloat16)
    agrees(q, cache, atol=2e-3 if scheme == "bf16" else 1e-2)


@interpreted
def test_what_nobody_sees_may_be_anything():
    """NaN in groups outside the window stays there; inside, it reaches the output and the lse."""
    torch.manual_seed(0)
    k, v = torch.randn(1, 128, 1, 16), torch.randn(1, 128, 1, 16)
    k[0, 5], v[0, 70] = float("nan"), float("nan")
    for scheme in ("fp32", "int4"):
        cache = vk.KVCache(scheme, b=1, m=1, d=16, capacity=128, group=32, residual=0, dtype=torch.float32)
        cache.append(k, v, backend="cpu")
        o, lse = vk.decode_attention(torch.randn(1, 1, 1, 16), cache, window=57, return_lse=True, backend="triton")
        assert torch.isfinite(o).all()
        assert torch.isfinite(lse).all()
        o, lse = vk.decode_attention(torch.randn(1, 1, 1, 16), cache, return_lse=True, backend="triton")
        assert torch.isnan(o).all()
        assert torch.isnan(lse).all()


@interpreted
@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_counters_are_clean_for_the_next_call(scheme):
    """Calls in a row, of other sizes in between, give the same bits and leave every counter at 0."""
    from vkernels.counters import counters

    torch.manual_seed(0)
    cache, other = (filled(scheme, b, 2, 16, 150, group=32, residual=0) for b in (1, 3))
    q, p = torch.randn(1, 1, 4, 16), torch.randn(3, 2, 4, 16)
    first = vk.decode_attention(q, cache, backend="triton")
    vk.decode_attention(p, other, backend="triton")
    assert torch.equal(vk.decode_attention(q, cache, backend="triton"), first)
    assert not counters(1, torch.device("cpu")).any()


@interpreted
@pytest.mark.parametrize(("scheme", "kernel"), [("fp32", ROWS), ("int4", CODES)])
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_any_number_of_splits(scheme, kernel, steps):
    from vkernels.triton.tiles import overridden

    torch.manual_seed(0)
    cache, q = filled(scheme, 1, 1, 16, 170, group=32, residual=0, capacity=400), torch.randn(1, 2, 3, 16)
    with overridden(kernel, {"BLOCK_R": 16, "BLOCK_N": 16, "PER_SM": 1, "SPLIT_STEPS": steps}):
        agrees(q, cache)


def inside_nan(tensor):
    """The same values, with NaN (or page numbers far outside) before and after them in memory."""
    fill = float("nan") if tensor.is_floating_point() else 10**6
    block = torch.full((3, *tensor.shape), fill, dtype=tensor.dtype)
    return block[1].copy_(tensor)


@interpreted
@pytest.mark.parametrize("scheme", ["fp32", "int4"])
@pytest.mark.parametrize("page", [None, 32])
def test_wrong_lengths_and_tables_read_nothing_outside(scheme, page):
    torch.manual_seed(0)
    cache = filled(scheme, 2, 1, 16, 96, group=32, residual=0, page=page)
    storage = [None if t is None else inside_nan(t) for t in cache.tensors()]
    q, table = torch.randn(2, 1, 1, 16), inside_nan(cache.table)
    for length in (-(2**31), -1, 97, 10**6, 2**31 - 1):
        lengths = torch.full((2,), length, dtype=torch.int32)
        for window in (0, 1, 50):
            o, _ = direct(q, cache, window, length=lengths, table=table, storage=storage)
            assert torch.isfinite(o).all(), (length, window)
    for entry in (-(2**31), -1, cache.pages, 10**6, 2**31 - 1):
        o, _ = direct(q, cache, table=torch.full_like(table, entry), storage=storage)
        nearest = torch.full_like(table, min(max(entry, 0), cache.pages - 1))
        assert torch.equal(o, direct(q, cache, table=nearest, storage=storage)[0]), entry


def skewed(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: {"table": c.table.long()}, "table must be contiguous int32"),
        (lambda c: {"length": c.lengths[:0]}, "length must have shape"),
        (lambda c: {"layout": [4, 48, 0, 0, 96, 0]}, "group must be 32, 64 or 128"),
        (lambda c: {"layout": [4, 32, 0, 0, 192, 0]}, "k_codes must have shape"),
        (lambda c: {"layout": [4, 32, 0, 0, 96, 128]}, "ring must fit the pages of the table"),
        (lambda c: {"layout": [4, 32, 0, 2, 96, 0]}, "k_sink must be given and contiguous"),
        (
            lambda c: {"storage": [None if t is None else skewed(t) for t in c.tensors()]},
            "k_codes must be given and contiguous",
        ),
        (
            lambda c: {"storage": [t if t is None else t.float() for t in c.tensors()]},
            "k_codes must have dtype torch.int32",
        ),
        (lambda c: {"window": -1}, "window must be at least 0"),
    ],
)
def test_a_direct_call_is_refused_before_it_could_read_outside(change, sentence):
    cache = vk.KVCache("int4", b=1, m=2, d=16, capacity=96, group=32, residual=0, dtype=torch.float32)
    changes = change(cache)
    with pytest.raises((ValueError, TypeError), match=f"decode_attention: {sentence}"):
        direct(torch.zeros(1, 1, 2, 16), cache, changes.pop("window", 0), **changes)


def test_a_float64_cache_is_refused():
    cache = vk.KVCache("int4", b=1, m=1, d=16, capacity=64, dtype=torch.float64)
    with pytest.raises(vk.NoBackend, match="float64 is served by the reference only"):
        vk.decode_attention(torch.zeros(1, 1, 1, 16), cache, backend="triton")


def test_captured_launches_share_no_counter(monkeypatch):
    from vkernels import counters

    cpu = torch.device("cpu")
    monkeypatch.setattr(counters, "_slabs", {cpu: [torch.arange(10, dtype=torch.int32)]})
    assert counters._captured(4, cpu).tolist() == [0, 1, 2, 3]
    assert counters._captured(4, cpu).tolist() == [4, 5, 6, 7]
    assert counters._captured(4, cpu).tolist() == [0, 0, 0, 0]  # no more: cleared by every replay
    assert counters._captured(2, cpu).tolist() == [8, 9]


def test_one_launch_and_one_compilation_whatever_the_length():
    """Twenty capacities and lengths: a call is one launch, a store one compilation; grids know no length."""
    from test_triton import python

    code = """
import json, torch, vkernels as vk
from vkernels.triton.aot import key
from vkernels.triton.launch import recording
found = {}
for name, scheme, options in (("plain", "bf16", {}), ("paged", "bf16", {"page": 16}), ("ring", "fp16", {"ring": True}),
                              ("codes", "int4", {"group": 32}), ("coded pages", "int2", {"group": 32, "page": 32})):
    keys, launches, grids = set(), 0, set()
    lengths = (33, 34, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 257, 999, 1000, 1024, 4096, 5000)
    for i, length in enumerate(lengths):
        cache = vk.KVCache(scheme, b=2, m=2, d=64, capacity=length, **options)
        q = torch.empty(2, 1, 8, 64, dtype=cache.dtype)
        for held in (0, length):
            cache.advance(held)
            with recording() as noted:
                vk.decode_attention(q, cache, backend="triton")
            launches += len(noted)
            keys |= {key(x) for x in noted}
            grids |= {(i, x.grid) for x in noted}
    found[name] = [launches, len(keys), len(grids)]
print(json.dumps(found))
"""
    assert set(map(tuple, json.loads(python("-c", code)).values())) == {(40, 1, 20)}


def test_the_first_row_of_every_table_is_pinned():
    from vkernels.triton.tiles import table

    tiles = table("decode_attention")
    rows = {"BLOCK_R": 64, "BLOCK_N": 64, "PER_SM": 2, "SPLIT_STEPS": 2, "num_warps": 4, "num_stages": 3}
    codes = {
        "BLOCK_R": 16,
        "BLOCK_N": 32,
        "PER_SM": 3,
        "SPLIT_STEPS": 4,
        "num_warps": 4,
        "num_stages": 3,
        "maxnreg": 168,
    }
    assert tiles[ROWS]["sm80"][0] == {"bytes": 2, "d": 128, **rows}
    assert tiles[CODES]["sm80"][0] == {"bytes": 2, "d": 64, **codes}
