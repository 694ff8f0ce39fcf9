"""kv_append in CUDA C++, emulated: what Triton's kernel does not share with it (test_kv_append_gpu.py holds both).

Planted one at a time in csrc/kv_append/kv_append_cuda.cu, each seen red here or there. Barriers: before the scales,
before the codes. Values: a table read past its end, a page that is none believed, a NaN unnoticed, what no float16
holds let through. Borders: a window one group short, one token kept late, one sink too many, a ring one row short, a
task too few for the window, the window written while it is read, a count or a length believed, rows taken for whole by
their strides or by where they begin. Codes: half the lanes of a range, words of four tokens at each other's places,
zeros stored over deltas. Blind to bank conflicts (any order of the vectors in shared memory gives the same codes) and
to two blocks that write one slot of a ring: blocks run one after the other here, so the last one wins, as it should.
A negative count does nothing without its bound, too.
"""

from __future__ import annotations

import pytest
import torch
from test_kv_append_gpu import both, same_storage

import vkernels as vk
from vkernels import library
from vkernels.kv_cache import STORAGE

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)


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


def test_a_call_that_begins_at_an_odd_address():
    """Every stride is a multiple of 16 bytes, and no row lies at one."""
    caches = [vk.KVCache("bf16", b=1, m=2, d=16, capacity=8) for _ in range(2)]
    k, v = (torch.randn(1 + 5 * 2 * 16).bfloat16()[1:].view(1, 5, 2, 16) for _ in "kv")
    for cache, backend in zip(caches, ("cpu", "cuda"), strict=True):
        cache.append(k, v, backend=backend)
    same_storage(*caches)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_threads_does_not_matter(order):
    """Forward, backward and shuffled: the window is read before it is filled, ranges before they are used."""
    library.emulator.module.set_order(order)
    try:
        both("cuda", "int4", (70, 40, 1, 130), d=24, group=32, residual=32, sinks=3)
        both("cuda", "int8", (40, 130), d=64, group=32, residual=0)  # values of several warps
        both("cuda", "bf16", (3, 40), d=24, dtype=torch.bfloat16)
    finally:
        library.emulator.module.set_order(3)


def test_the_largest_tile():
    """128 tokens of 256 float32 channels fill 150 KB of shared memory."""
    both("cuda", "int2", (130,), d=256, group=128, residual=0)
