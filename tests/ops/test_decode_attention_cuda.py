"""decode_attention on CUDA, emulated: what the tests derived from the spec do not look at.

Trusted after mutation, each planted alone and red here: no barrier of the warp before a stage is read, copies not
waited for or not committed, one stage too few; no barrier of the block before outputs overwrite the rings, after
them, after the splits are weighed; rows of an operand swapped, another token of a pair, weights not transposed; a
causal end, a window or what all queries see off by one, outputs rescaled too rarely; the group a window cuts left
out, unseen values not hidden, a ring that never drops or turns late; a page number or a length not clamped; codes not
centred, the other half of a 2-bit word, 2-bit rows in the order of 4-bit ones, another middle, outputs of codes not
doubled; delta and zero of value groups interleaved, words of values always from a group's start; queries of another
head, their norm forgotten, a second block of rows with the queries of the first; a counter not put back, one part too
few joined, warps not brought to one maximum, sinks that start at 0.
"""

from __future__ import annotations

import math

import pytest
import torch

import vkernels as vk
from vkernels import library
from vkernels.counters import counters
from vkernels.ops.decode_attention import torch_op

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

F16, BF16 = torch.float16, torch.bfloat16
# What rounding costs: rows multiply what is stored; codes become float16, and so do queries. Outputs are of order 1.
LSE = {0: 2e-6, 8: 4e-4, 4: 4e-4, 2: 4e-4}
OUT = {F16: 2e-3, BF16: 1.6e-2}


def filled(scheme, b, m, d, length, dtype=F16, **options):
    options = {"capacity": max(length, 1), **options}
    cache = vk.KVCache(scheme, b=b, m=m, d=d, dtype=dtype, **options)
    k, v = (torch.randn(b, length, m, d).to(cache.dtype) for _ in "kv")
    return cache.append(k, v, backend="cpu")


def direct(q, cache, window=0, scale=None, **changes):
    """The registered operator, past every check of the public function."""
    at = {"length": cache.lengths, "table": cache.table, "layout": cache.layout.ints(), **changes}
    storage = changes.get("storage", cache.tensors())
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    run = torch.ops.vkernels.decode_attention.cuda
    return run(q, at["length"], at["table"], *storage, scale, window, at["layout"])


def agrees(q, cache, **options):
    got = vk.decode_attention(q, cache, return_lse=True, backend="cuda", **options)
    want = vk.decode_attention(q.float(), cache, return_lse=True, backend="reference", **options)
    torch.testing.assert_close(got[0].float(), want[0], rtol=1e-2, atol=OUT[q.dtype])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=LSE[cache.bits])
    return got


def test_three_tokens_worked_by_hand():
    cache = vk.KVCache("fp16", b=1, m=1, d=8, capacity=3)
    k, v = torch.zeros(1, 3, 1, 8, dtype=F16), torch.zeros(1, 3, 1, 8, dtype=F16)
    k[0, :, 0, 0] = torch.tensor([0.0, math.log2(3.0), 2.0])
    v[0, :, 0, 0] = torch.tensor([8.0, 0.0, 16.0])
    q = torch.zeros(1, 2, 1, 8, dtype=F16)
    q[..., 0] = 1.0
    o, lse = vk.decode_attention(q, cache.append(k, v), scale=math.log(2), return_lse=True, backend="cuda")
    # Weights 1 : 3 for the query before last, 1 : 3 : 4 for the last; log2(3) is rounded to 11 bits.
    torch.testing.assert_close(o[0, :, 0, 0].float(), torch.tensor([2.0, 9.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(lse[0, 0], torch.tensor([math.log(4.0), math.log(8.0)]), rtol=0, atol=5e-4)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_one_code_worked_by_hand(bits):
    """A key of the group is 4 in channel 9 and 0 elsewhere, the others are 0: delta code + zero gives both exactly."""
    k, v = torch.zeros(1, 32, 1, 16, dtype=F16), torch.zeros(1, 32, 1, 16, dtype=F16)
    k[0, 21, 0, 9] = 4.0
    v[0, 21, 0, 6] = 2.0
    cache = vk.KVCache(f"int{bits}", b=1, m=1, d=16, capacity=32, group=32, residual=0, dtype=F16)
    cache.append(k, v, backend="cpu")
    q = torch.zeros(1, 1, 1, 16, dtype=F16)
    q[..., 9] = 1.0
    o, lse = vk.decode_attention(q, cache, scale=math.log(2), return_lse=True, backend="cuda")
    # One weight of 16 beside 31 of 1.
    assert lse.item() == pytest.approx(math.log(47), abs=3e-3)
    assert o[0, 0, 0, 6].item() == pytest.approx(2 * 16 / 47, rel=5e-3)
    assert o[0, 0, 0, :6].abs().max() < 1e-6
    assert o[0, 0, 0, 7:].abs().max() < 1e-6


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 127, 128, 129, 144])
def test_steps_and_splits_end_anywhere(length):
    agrees(torch.randn(1, 1, 2, 16).half(), filled("fp16", 1, 1, 16, length, capacity=300))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("group", "d"), [(32, 16), (32, 72), (32, 128), (64, 40), (64, 128), (128, 24), (128, 112)])
def test_every_shape_of_a_unit(bits, group, d):
    """Part of a word, of a unit, of 64 channels, of a group of channels."""
    cache = filled(f"int{bits}", 1, 1, d, 2 * group + 5, group=group, residual=0)
    agrees(torch.randn(1, 1, 2, d).half(), cache)


@pytest.mark.parametrize("d", [8, 32, 56, 64, 80, 88, 96, 120, 128])
def test_every_head_size_of_rows(d):
    agrees(torch.randn(1, 1, 3, d).bfloat16(), filled("bf16", 1, 1, d, 37))


@pytest.mark.parametrize(("scheme", "length"), [("bf16", 700), ("int8", 1300), ("int4", 1300), ("int2", 1500)])
def test_stages_are_filled_again(scheme, length, monkeypatch):
    """One split: every warp passes its ring several times."""
    monkeypatch.setattr(torch_op, "_splits", lambda *_: 1)
    cache = filled(scheme, 1, 1, 16, length, BF16, group=32, residual=32 if scheme != "bf16" else None)
    agrees(torch.randn(1, 2, 2, 16).bfloat16(), cache)


@pytest.mark.parametrize("scheme", ["fp16", "int4"])
@pytest.mark.parametrize("splits", [2, 3, 512])
def test_any_number_of_splits(scheme, splits, monkeypatch):
    monkeypatch.setattr(torch_op, "_splits", lambda *_: splits)
    cache = filled(scheme, 1, 1, 16, 900, group=32, residual=0, capacity=1000)
    agrees(torch.randn(1, 2, 3, 16).half(), cache)


@pytest.mark.parametrize("length", [31, 32, 63, 64, 65, 97, 191, 200])
def test_groups_move_from_recent_to_coded(length):
    cache = filled("int4", 1, 1, 16, length, capacity=200, group=32, residual=32, sinks=2)
    agrees(torch.randn(1, 2, 2, 16).half(), cache)


@pytest.mark.parametrize("window", [None, 1, 2, 33, 70, 76, 138, 1000])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("fp16", {"page": 12}),
        ("fp16", {"ring": True, "capacity": 50, "sinks": 3}),
        ("int4", {"group": 32, "residual": 32, "page": 32}),
        ("int8", {"group": 32, "residual": 0, "ring": True, "capacity": 64, "sinks": 3}),
    ],
    ids=["paged", "ring", "coded-paged", "coded-ring"],
)
def test_windows_over_every_store(scheme, options, window):
    cache = filled(scheme, 2, 1, 16, 141, **options)
    agrees(torch.randn(2, 3, 2, 16).half(), cache, window=window)


@pytest.mark.parametrize("scheme", ["bf16", "int2"])
def test_a_ring_at_every_place_it_can_be_cut(scheme):
    cache = vk.KVCache(scheme, b=1, m=1, d=16, capacity=64, ring=True, group=32, residual=None, dtype=BF16)
    for count in (60, 3, 1, 1, 30, 40, 64, 17):
        k, v = (torch.randn(1, count, 1, 16).bfloat16() for _ in "kv")
        cache.append(k, v, backend="cpu")
        agrees(torch.randn(1, 1, 1, 16).bfloat16(), cache)


@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("scheme", ["fp16", "int4"])
def test_sinks_before_there_is_a_history(scheme, length):
    cache = filled(scheme, 1, 1, 16, length, capacity=64, ring=True, sinks=3, group=32, residual=0)
    agrees(torch.randn(1, 1, 1, 16).half(), cache)


@pytest.mark.parametrize(("n", "s"), [(7, 1), (9, 1), (17, 1), (6, 3), (5, 8)])
@pytest.mark.parametrize("scheme", ["fp16", "int8"])
def test_more_queries_than_a_product_has_columns(scheme, n, s):
    """7, 9, 17, 18 and 40 queries share their keys over tiles of 8 and blocks of 16."""
    agrees(torch.randn(2, s, 2 * n, 16).half(), filled(scheme, 2, 2, 16, 70, group=32, residual=0))


@pytest.mark.parametrize("scheme", ["bf16", "int4"])
def test_sequences_of_every_length_side_by_side(scheme):
    """An empty one, one shorter than the queries, one within the residual, a long one."""
    cache = vk.KVCache(scheme, b=4, m=1, d=16, capacity=300, group=32, residual=0, dtype=BF16)
    k, v = (torch.randn(4, 300, 1, 16).bfloat16() for _ in "kv")
    cache.append(k, v, count=torch.tensor([0, 2, 31, 300]), backend="cpu")
    o, lse = agrees(torch.randn(4, 4, 2, 16).bfloat16(), cache)
    assert torch.equal(o[0], torch.zeros(4, 2, 16, dtype=BF16))
    assert torch.isinf(lse[0]).all()
    assert torch.isinf(lse[1, :, :2]).all()
    assert torch.isfinite(lse[1, :, 2:]).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_queries_meet_codes_to_eleven_bits(dtype):
    """Codes and queries below 1 are float16 whatever the queries are: large ones of bfloat16 lose nothing."""
    cache = filled("int4", 1, 1, 64, 256, dtype, group=64, residual=0)
    q = (100 * torch.randn(1, 1, 2, 64)).to(dtype)
    _, lse = vk.decode_attention(q, cache, scale=1 / 800, return_lse=True, backend="cuda")
    _, want = vk.decode_attention(q, cache, scale=1 / 800, return_lse=True, backend="reference")
    assert (lse - want).abs().max() < 5e-4


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_largest_keys_and_values_do_not_overflow(bits):
    """The whole range of float16, where zero + delta code is just above it."""
    k = torch.zeros(1, 32, 1, 16)
    k[0, ::2], k[0, 1::2] = 65504.0, -65504.0
    cache = vk.KVCache(f"int{bits}", b=1, m=1, d=16, capacity=32, group=32, residual=0, dtype=BF16)
    cache.append(k.bfloat16(), k.bfloat16(), backend="cpu")
    q = torch.full((1, 1, 1, 16), 1e30, dtype=BF16)
    got = vk.decode_attention(q, cache, scale=1e-36, backend="cuda")
    want = vk.decode_attention(q, cache, scale=1e-36, backend="reference")
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=65504 * 2e-2)


@pytest.mark.parametrize("bits", [8, 2])
def test_the_smallest_scales_lose_no_digit(bits):
    """Deltas below the normal numbers of float16 are halved nowhere."""
    k, v = torch.randn(1, 32, 1, 16), torch.randn(1, 32, 1, 16) * 1e-5
    cache = vk.KVCache(f"int{bits}", b=1, m=1, d=16, capacity=32, group=32, residual=0, dtype=F16)
    cache.append(k.half(), v.half(), backend="cpu")
    q = torch.randn(1, 1, 1, 16).half()
    got = vk.decode_attention(q, cache, backend="cuda")
    want = vk.decode_attention(q.float(), cache, backend="reference")
    assert (got.float() - want).abs().max() <= 2.0**-23  # two steps of float16 there


def test_scales_of_either_sign_and_none():
    for scheme in ("fp16", "int8"):
        cache = filled(scheme, 1, 1, 16, 70, group=32, residual=0)
        for scale in (-0.3, 0.0, 0.4):
            agrees(torch.randn(1, 1, 2, 16).half(), cache, scale=scale)


def test_queries_of_any_strides():
    """Queries inside a packed tensor that starts at an odd element."""
    for scheme in ("fp16", "int4"):
        cache = filled(scheme, 2, 2, 24, 70, group=32, residual=0)
        packed = torch.randn(2 * 3 * 4 * 40 + 1).half()[1:].view(2, 3, 4, 40)
        agrees(packed[..., 7:31], cache)
        agrees(torch.randn(2, 4, 3, 24).half().transpose(1, 2), cache)


def test_what_nobody_sees_may_be_anything():
    """NaN in groups outside the window stays there; inside, it reaches the output and the lse."""
    k, v = torch.randn(1, 128, 1, 16).half(), torch.randn(1, 128, 1, 16).half()
    k[0, 5], v[0, 70] = float("nan"), float("nan")
    for scheme in ("fp16", "int4", "int2"):
        cache = vk.KVCache(scheme, b=1, m=1, d=16, capacity=128, group=32, residual=0, dtype=F16)
        cache.append(k, v, backend="cpu")
        q = torch.randn(1, 1, 1, 16).half()
        o, lse = vk.decode_attention(q, cache, window=57, return_lse=True, backend="cuda")
        assert torch.isfinite(o).all()
        assert torch.isfinite(lse).all()
        o, lse = vk.decode_attention(q, cache, return_lse=True, backend="cuda")
        assert torch.isnan(o).all()
        assert torch.isnan(lse).all()


@pytest.mark.parametrize("scheme", ["fp16", "int4"])
def test_counters_are_clean_for_the_next_call(scheme):
    """Calls in a row, of other sizes in between, give the same bits and leave every counter at 0."""
    cache, other = (filled(scheme, b, 2, 16, 900, group=32, residual=0) for b in (1, 2))
    q, p = torch.randn(1, 1, 4, 16).half(), torch.randn(2, 2, 4, 16).half()
    first = vk.decode_attention(q, cache, backend="cuda")
    vk.decode_attention(p, other, backend="cuda")
    assert torch.equal(vk.decode_attention(q, cache, backend="cuda"), first)
    assert not counters(1, torch.device("cpu")).any()


@pytest.mark.parametrize("scheme", ["fp16", "int4"])
def test_the_order_of_threads_changes_nothing(scheme):
    cache, q = filled(scheme, 1, 1, 16, 400, group=32, residual=0), torch.randn(1, 1, 3, 16).half()
    seen = []
    try:
        for order in range(3):
            library.emulator.module.set_order(order)
            seen.append(vk.decode_attention(q, cache, backend="cuda"))
    finally:
        library.emulator.module.set_order(3)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def inside_nan(tensor):
    """The same values, with NaN (or page numbers far outside) before and after them in memory."""
    fill = float("nan") if tensor.is_floating_point() else 10**6
    block = torch.full((3, *tensor.shape), fill, dtype=tensor.dtype)
    return block[1].copy_(tensor)


@pytest.mark.parametrize("scheme", ["fp16", "int4"])
@pytest.mark.parametrize("page", [None, 32])
def test_wrong_lengths_and_tables_read_nothing_outside(scheme, page):
    """The emulator refuses any access outside the call's tensors."""
    cache = filled(scheme, 2, 1, 16, 96, group=32, residual=0, page=page, sinks=0)
    storage = [None if t is None else inside_nan(t) for t in cache.tensors()]
    q, table = torch.randn(2, 1, 1, 16).half(), cache.table.clone()
    for length in (-(2**31), -1, 97, 10**6, 2**31 - 1):
        lengths = torch.full((2,), length, dtype=torch.int32)
        for window in (0, 1, 50, 2**40):
            o, _ = direct(q, cache, window, length=lengths, table=table, storage=storage)
            assert torch.isfinite(o).all(), (length, window)
    for entry in (-(2**31), -1, cache.pages, 10**6, 2**31 - 1):
        o, _ = direct(q, cache, table=torch.full_like(table, entry), storage=storage)
        nearest = torch.full_like(table, min(max(entry, 0), cache.pages - 1))
        assert torch.equal(o, direct(q, cache, table=nearest, storage=storage)[0]), entry


@pytest.mark.parametrize("length", [-1, 70, 2**31 - 1])
@pytest.mark.parametrize("scheme", ["bf16", "int2"])
def test_wrong_lengths_of_a_ring_with_sinks(scheme, length):
    cache = filled(scheme, 1, 1, 16, 64, BF16, group=32, residual=None, ring=True, sinks=3)
    for window in (0, 40):
        o, _ = direct(torch.randn(1, 2, 1, 16).bfloat16(), cache, window, length=torch.tensor([length]).int())
        assert torch.isfinite(o).all()


def skewed(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: {"table": c.table.long()}, "table must have dtype code 3"),
        (lambda c: {"length": c.lengths[:0]}, "length must have size 1 in dimension 0"),
        (lambda c: {"layout": [4, 48, 0, 0, 96, 0]}, "group must be 32, 64 or 128"),
        (lambda c: {"layout": [4, 32, 0, 0, 192, 0]}, "k_codes must have size 6 in dimension 2"),
        (lambda c: {"layout": [4, 32, 0, 0, 96, 128]}, "ring must fit the pages of the table"),
        (lambda c: {"layout": [4, 32, 0, 2, 96, 0]}, "k_sink must have rank 4"),
        (lambda c: {"layout": [4, 32]}, "layout must be that of a KVCache"),
        (lambda c: {"storage": [None if t is None else skewed(t) for t in c.tensors()]}, "k_codes must be contiguous"),
        (
            lambda c: {"storage": [t if t is None else t.double() for t in c.tensors()]},
            "k_codes must have dtype code 3",
        ),
        (lambda c: {"window": -1}, "window must be at least 0"),
        (lambda c: {"scale": math.inf}, "scale must be finite"),
        (lambda c: {"q": torch.zeros(1, 1, 2, 16)}, "q must have the cache's dtype, bfloat16 or float16"),
        (lambda c: {"q": torch.zeros(1, 9, 2, 16).half()}, "q must hold 1 to 8 tokens"),
        (lambda c: {"q": torch.zeros(1, 1, 3, 16).half()}, "q must have a multiple of the cache's heads"),
    ],
)
def test_a_direct_call_is_refused_before_it_could_read_outside(change, sentence):
    cache = vk.KVCache("int4", b=1, m=2, d=16, capacity=96, group=32, residual=0, dtype=F16)
    changes = change(cache)
    q = changes.pop("q", torch.zeros(1, 1, 2, 16).half())
    with pytest.raises(ValueError, match=f"decode_attention: {sentence}"):
        direct(q, cache, changes.pop("window", 0), changes.pop("scale", None), **changes)


def test_storage_that_starts_between_vectors_is_refused():
    cache = filled("fp16", 1, 1, 16, 4)
    storage = [t if t is None else torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape) for t in cache.tensors()]
    with pytest.raises(ValueError, match="decode_attention: k_rows must start at a multiple of 16 bytes, got 2"):
        direct(torch.zeros(1, 1, 1, 16).half(), cache, storage=storage)


def test_what_the_kernels_leave_to_triton():
    q = torch.zeros(1, 1, 1, 16)
    for call, sentence in (
        ((q, filled("fp32", 1, 1, 16, 4)), "dtype float32 is served by Triton"),
        ((q.bfloat16(), filled("int4", 1, 1, 16, 4, F16)), "on a cache of dtype torch.float16 are served by Triton"),
        ((torch.zeros(1, 1, 1, 136).half(), filled("fp16", 1, 1, 136, 4)), "heads of size 136 are served by Triton"),
    ):
        with pytest.raises(vk.NoBackend, match=f"decode_attention: backend cuda cannot run this call: .*{sentence}"):
            vk.decode_attention(*call, backend="cuda")


def test_splits_know_sizes_only():
    """LLaMA-7B at 8,192 tokens on 132 multiprocessors; a small cache; a batch that fills the chip."""
    cpu = torch.device("cpu")
    assert torch_op._splits(cpu, 32, 1, 8192, [0, 1, 0, 0, 8192, 0]) == 9
    assert torch_op._splits(cpu, 4, 7, 32768, [4, 64, 128, 0, 32768, 0]) == 33
    assert (
        torch_op._splits(cpu, 1, 1, 64, [4, 64, 128, 0, 64, 0]) == 4
    )  # 2 steps over codes, 12 that cost as much as two
    assert torch_op._splits(cpu, 1024, 1, 8192, [0, 1, 0, 0, 8192, 0]) == 1
