"""kv_append on Triton and in CUDA C++: what is stored is bit for bit what the CPU kernel stores, at every border of
groups and windows. What was planted and seen red is listed in the two files of the backends.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import vkernels as vk
from vkernels import library
from vkernels.kv_cache import STORAGE

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares with the CPU kernel, interpreted or emulated"
)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param == "cuda" and library.emulator is None:
        pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)")
    if request.param == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton)")
    return request.param


def both(backend, scheme, steps, d=16, m=1, b=1, dtype=torch.float32, spoil=None, **options):
    """Two caches, the same tokens appended by the CPU and `backend`: every tensor of the storage agrees bit for bit."""
    capacity = options.pop("capacity", sum(steps))
    caches = [vk.KVCache(scheme, b=b, m=m, d=d, capacity=capacity, dtype=dtype, **options) for _ in range(2)]
    torch.manual_seed(1)
    for step in steps:
        k, v = (torch.randn(b, step, m, d).to(caches[0].dtype) for _ in "kv")
        if spoil is not None:
            spoil(k, v)
        for cache, name in zip(caches, ("cpu", backend), strict=True):
            cache.append(k, v, backend=name)
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
def test_steps_across_every_border(backend, scheme, options):
    """Steps that end one before, at and one after a full window, that fill it at once, and that overtake it."""
    both(backend, scheme, (1, 30, 1, 1, 31, 33, 0, 95, 1, 130, 64, 32), **options)


@pytest.mark.parametrize(("d", "dtype"), [(8, torch.float32), (72, torch.bfloat16), (136, torch.float16)])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int2"])
def test_head_sizes_that_fill_no_block(backend, scheme, d, dtype):
    both(backend, scheme, (70, 30), d=d, m=2 if d < 100 else 1, dtype=dtype, group=32, residual=32)


def test_a_group_of_128(backend):
    both(backend, "int2", (300,), d=24, group=128, residual=128)


def test_values_no_float16_holds_and_groups_without_spread(backend):
    def spoil(k, v):
        k[:, 3, :, 1], v[:, 4, :, 2] = float("nan"), float("inf")
        k[:, 5, :, 3], k[:, :, :, 4] = -1e6, 1e-9
        v[:, 6], v[:, 7] = 0.3, -1e-40
        k[:, 8:40, :, 5] = torch.linspace(-1e-7, 1e-7, 32)[:, None]

    cache = both(backend, "int4", (64,), spoil=spoil, group=32, residual=0)
    assert cache.storage("k_scale")[0, 0, 0, :, 1].isnan().all()
    assert cache.storage("v_scale")[0, 0, 0, :, 0, 4].isfinite().all()


def test_codes_worked_by_hand(backend):
    cache = vk.KVCache("int4", b=1, m=1, d=8, capacity=32, group=32, residual=0, dtype=torch.float32)
    # Channel c of token t holds (t + c) % 16 as key: delta = 1, zero = 0, token 9 reads 9 a b c d e f 0, lowest first.
    k = ((torch.arange(32)[:, None] + torch.arange(8)) % 16).float()[None, :, None]
    # Values t + 15 c / 7: 8 channels span 15, so delta = 1, zero = t, codes round(15 c / 7) = 0 2 4 6 9 b d f.
    v = (torch.arange(32)[:, None] + 15 * torch.arange(8) / 7).float()[None, :, None]
    v[..., 7] = v[..., 0] + 15
    cache.append(k, v, backend=backend)
    assert cache.storage("k_codes")[0, 0, 0, 0, 9].item() == 0x0FEDCBA9
    assert cache.storage("k_scale")[0, 0, 0].tolist() == [[1.0] * 8, [0.0] * 8]
    assert [word % 2**32 for word in cache.storage("v_codes")[0, 0, 0, 3, :8].tolist()] == [
        digit * 0x11111111 for digit in (0, 2, 4, 6, 9, 11, 13, 15)
    ]
    assert cache.storage("v_scale")[0, 0, 0, 1, 0].tolist() == list(range(32))


@pytest.mark.parametrize("scheme", ["int8", "int2", "fp32"])
def test_ragged_counts_and_strides(backend, scheme):
    caches = [
        vk.KVCache(scheme, b=3, m=2, d=16, capacity=200, dtype=torch.float32, residual=64 if scheme != "fp32" else None)
        for _ in range(2)
    ]
    for counts in ([70, 3, 0], [1, 90, 64]):
        k, v = (torch.randn(3, 2, 90, 32)[..., 8:24].transpose(1, 2) for _ in "kv")
        for cache, name in zip(caches, ("cpu", backend), strict=True):
            cache.append(k, v, count=counts, backend=name)
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
        same_storage(*caches)


@pytest.mark.parametrize("bad", ["table", "negative table", "length", "negative length", "count", "negative count"])
@pytest.mark.parametrize("scheme", ["int4", "bf16"])
def test_hostile_values_stay_inside(backend, scheme, bad):
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
    getattr(torch.ops.vkernels.kv_append, backend)(k, k, count, length, table, *tensors, c.layout.ints())
    assert all((block[::2] == 77).all() for block in guarded)
    if bad in ("table", "negative table", "length", "negative count"):
        codes = tensors[2 if scheme == "int4" else 0]
        assert not codes.any(), "stored where no place is"
