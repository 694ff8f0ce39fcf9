"""kv_append in CUDA C++, emulated: what it stores is bit for bit what the CPU kernel stores, at every border of groups
and windows.

Planted one at a time in csrc/kv_append/kv_append_cuda.cu, each seen red here. Barriers: before the scales, before the
codes. Values: a table read past its end, a page that is none believed, a NaN unnoticed, what no float16 holds let
through. Borders: a window one group short, one token kept late, one sink too many, a ring one row short, a task too few
for the window. Codes: half the lanes of a range, words of four tokens at each other's places, zeros stored over deltas.
Blind to bank conflicts (any order of the vectors in shared memory gives the
same codes) and to two blocks that write one slot of a ring: blocks run one after the other here, so the last one wins,
as it should.
"""

from __future__ import annotations

import pytest
import torch

import vkernels as vk
from vkernels import library
from vkernels.kv_cache import STORAGE

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)


def both(scheme, steps, d=16, m=1, b=1, dtype=torch.float32, spoil=None, **options):
    """Two caches, the same tokens appended by each backend; every tensor of the storage must agree bit for bit."""
    capacity = options.pop("capacity", sum(steps))
    caches = [vk.KVCache(scheme, b=b, m=m, d=d, capacity=capacity, dtype=dtype, **options) for _ in range(2)]
    torch.manual_seed(1)
    for step in steps:
        k, v = (torch.randn(b, step, m, d).to(caches[0].dtype) for _ in "kv")
        if spoil is not None:
            spoil(k, v)
        for cache, backend in zip(caches, ("cpu", "cuda"), strict=True):
            cache.append(k, v, backend=backend)
        same_storage(*caches)
    return caches[1]


def same_storage(*caches):
    for name in STORAGE:
        a, b = (getattr(cache, name) for cache in caches)
        if a is not None:
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), name
            assert torch.equal(a.isnan(), b.isnan()), name


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {"group": 32, "residual": 0}),
        ("int4", {"group": 32, "residual": 64, "sinks": 3}),
        ("int2", {"group": 64, "residual": 64, "page": 64}),
        ("int4", {"group": 32, "residual": 32, "ring": True, "capacity": 64, "sinks": 2}),
        ("fp32", {"ring": True, "capacity": 5, "sinks": 2}),
        ("fp32", {"page": 7}),
    ],
)
def test_steps_across_every_border(scheme, options):
    """Steps that end one before, at and one after a full window, that fill it at once, and that overtake it."""
    both(scheme, (1, 30, 1, 1, 31, 33, 0, 95, 1, 130, 64, 32), **options)


@pytest.mark.parametrize(("d", "dtype"), [(8, torch.float32), (72, torch.bfloat16), (136, torch.float16)])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int2"])
def test_head_sizes_that_fill_no_block(scheme, d, dtype):
    both(scheme, (70, 30), d=d, m=2 if d < 100 else 1, dtype=dtype, group=32, residual=32)


def test_a_group_of_128():
    both("int2", (300,), d=24, group=128, residual=128)


def test_values_no_float16_holds_and_groups_without_spread():
    def spoil(k, v):
        k[:, 3, :, 1], v[:, 4, :, 2] = float("nan"), float("inf")
        k[:, 5, :, 3], k[:, :, :, 4] = -1e6, 1e-9
        v[:, 6], v[:, 7] = 0.3, -1e-40
        k[:, 8:40, :, 5] = torch.linspace(-1e-7, 1e-7, 32)[:, None]

    cache = both("int4", (64,), spoil=spoil, group=32, residual=0)
    assert cache.storage("k_scale")[0, 0, 0, :, 1].isnan().all()
    assert cache.storage("v_scale")[0, 0, 0, :, 0, 4].isfinite().all()


def test_codes_worked_by_hand():
    cache = vk.KVCache("int4", b=1, m=1, d=8, capacity=32, group=32, residual=0, dtype=torch.float32)
    # Channel c of token t holds (t + c) % 16 as key: delta = 1, zero = 0, token 9 reads 9 a b c d e f 0, lowest first.
    k = ((torch.arange(32)[:, None] + torch.arange(8)) % 16).float()[None, :, None]
    # Values t + 15 c / 7: 8 channels span 15, so delta = 1, zero = t, codes round(15 c / 7) = 0 2 4 6 9 b d f.
    v = (torch.arange(32)[:, None] + 15 * torch.arange(8) / 7).float()[None, :, None]
    v[..., 7] = v[..., 0] + 15
    cache.append(k, v, backend="cuda")
    assert cache.storage("k_codes")[0, 0, 0, 0, 9].item() == 0x0FEDCBA9
    assert cache.storage("k_scale")[0, 0, 0].tolist() == [[1.0] * 8, [0.0] * 8]
    assert [word % 2**32 for word in cache.storage("v_codes")[0, 0, 0, 3, :8].tolist()] == [
        digit * 0x11111111 for digit in (0, 2, 4, 6, 9, 11, 13, 15)
    ]
    assert cache.storage("v_scale")[0, 0, 0, 1, 0].tolist() == list(range(32))


@pytest.mark.parametrize("scheme", ["int8", "int2", "fp32"])
def test_ragged_counts_and_strides(scheme):
    caches = [
        vk.KVCache(scheme, b=3, m=2, d=16, capacity=200, dtype=torch.float32, residual=64 if scheme != "fp32" else None)
        for _ in range(2)
    ]
    for counts in ([70, 3, 0], [1, 90, 64]):
        k, v = (torch.randn(3, 2, 90, 32)[..., 8:24].transpose(1, 2) for _ in "kv")
        for cache, backend in zip(caches, ("cpu", "cuda"), strict=True):
            cache.append(k, v, count=counts, backend=backend)
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
        same_storage(*caches)


@pytest.mark.parametrize("bad", ["table", "negative table", "length", "negative length", "count", "negative count"])
@pytest.mark.parametrize("scheme", ["int4", "bf16"])
def test_hostile_values_stay_inside(scheme, bad):
    """Nobody could look at these without waiting for the device: what has no place is not stored."""
    c = vk.KVCache(scheme, b=1, m=1, d=16, capacity=128, page=64, **({"residual": 0} if scheme == "int4" else {}))
    c.reserve(128)
    k = torch.ones(1, 64, 1, 16, dtype=torch.bfloat16)
    count, length, table = torch.tensor([64], dtype=torch.int32), c.lengths.clone(), c.table.clone()
    changed = {"table": table[0, :1], "length": length, "count": count}[bad.split()[-1]]
    changed.fill_(-7 if "negative" in bad else 2**31 - 8)
    guarded = []
    for tensor in c.tensors():  # each in the middle of memory nobody may touch
        if tensor is not None:
            block = torch.full((3, *tensor.shape), 77, dtype=tensor.dtype)
            block[1].zero_()
            guarded.append(block)
    inside = iter(guarded)
    tensors = [None if t is None else next(inside)[1] for t in c.tensors()]
    torch.ops.vkernels.kv_append.cuda(k, k, count, length, table, *tensors, c.layout.ints())
    assert all((block[::2] == 77).all() for block in guarded)
    if bad in ("table", "negative table", "length", "negative count"):
        codes = tensors[2 if scheme == "int4" else 0]
        assert not codes.any(), "stored where no place is"


def test_a_count_beyond_the_call_reads_nothing_beyond_it():
    c = vk.KVCache("int4", b=1, m=1, d=16, capacity=128, sinks=40, residual=0)
    k, count = torch.ones(1, 3, 1, 16, dtype=torch.bfloat16), torch.tensor([2**31 - 8], dtype=torch.int32)
    torch.ops.vkernels.kv_append.cuda(k, k, count, c.lengths, c.table, *c.tensors(), c.layout.ints())
    assert c.storage("k_sink").sum() == 3 * 16


def test_a_direct_call_is_refused_before_it_could_read_outside():
    c = vk.KVCache("int4", b=1, m=2, d=16, capacity=64, residual=0)
    k, count = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16), torch.tensor([4], dtype=torch.int32)
    run = torch.ops.vkernels.kv_append.cuda

    def call(k=k, v=k, count=count, layout=None, **storage):
        tensors = [storage.get(name, getattr(c, name)) for name in STORAGE]
        run(k, v, count, c.lengths, c.table, *tensors, layout or c.layout.ints())

    odd = torch.zeros(1, 4, 2, 20, dtype=torch.bfloat16)
    for match, change in (
        ("v must have size 4 in dimension 1", {"v": k[:, :3]}),
        ("count must have dtype code 3", {"count": count.long()}),
        ("k must have dtype code 1", {"k": k.float(), "v": k.float()}),
        ("k_codes must have size 2 in dimension 3", {"k_codes": c.storage("k_codes")[..., :1, :].contiguous()}),
        ("residual must be a multiple of group", {"layout": [4, 64, 1, 0, 64, 0]}),
        ("bits must be 0, 2, 4 or 8", {"layout": [3, 64, 0, 0, 64, 0]}),
        ("k must have heads of a multiple of 8 elements", {"k": odd, "v": odd}),
    ):
        with pytest.raises(ValueError, match=f"kv_append: {match}"):
            call(**change)


def test_rows_that_leave_16_byte_addresses():
    """The call's rows may start anywhere; the storage does not."""
    for scheme in ("bf16", "int4"):
        caches = [vk.KVCache(scheme, b=2, m=2, d=16, capacity=96) for _ in range(2)]
        for first, count in ((3, 40), (0, 56)):
            k, v = (torch.randn(2, count, 2, 20).bfloat16()[..., first : first + 16] for _ in "kv")
            for cache, backend in zip(caches, ("cpu", "cuda"), strict=True):
                cache.append(k, v, backend=backend)
            same_storage(*caches)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_threads_does_not_matter(order):
    """Forward, backward and shuffled: the window is read before it is filled, ranges before they are used."""
    library.emulator.module.set_order(order)
    try:
        both("int4", (70, 40, 1, 130), d=24, group=32, residual=32, sinks=3)
        both("int8", (40, 130), d=64, group=32, residual=0)  # values of several warps
        both("bf16", (3, 40), d=24, dtype=torch.bfloat16)
    finally:
        library.emulator.module.set_order(3)


def test_the_largest_tile():
    """128 tokens of 256 float32 channels fill 150 KB of shared memory."""
    both("int2", (130,), d=256, group=128, residual=0)
