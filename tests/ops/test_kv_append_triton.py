"""kv_append on Triton: what the CUDA kernel does not share with it (test_kv_append_gpu.py holds both).

Trusted after mutation, each planted alone and red here, there or in the derived tests:
delta rounded inward, zero rounded up, a NaN that goes unnoticed, a window one group short, a window that keeps one
token late, sinks forgotten in what was there before, a ring that drops one group (one row) too many, a page number of
-1 believed, a table read past its end, too few tasks for the window, value words of every part at the first place.
Blind to a missing barrier between reading and filling the window: the interpreter runs one thread.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from test_triton import python

import vkernels as vk
from vkernels.kv_cache import STORAGE

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU kernel, interpreted"),
]


def test_a_direct_call_is_refused_before_it_could_read_outside():
    c = vk.KVCache("int4", b=1, m=2, d=16, capacity=64, residual=0)
    k, count = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16), torch.tensor([4], dtype=torch.int32)
    run = torch.ops.vkernels.kv_append.triton

    def call(k=k, v=k, count=count, layout=None, **storage):
        tensors = [storage.get(name, getattr(c, name)) for name in STORAGE]
        run(k, v, count, c.lengths, c.table, *tensors, layout or c.layout.ints())

    with pytest.raises(ValueError, match="kv_append: v must have shape"):
        call(v=k[:, :3])
    with pytest.raises(TypeError, match="kv_append: count must have dtype int32"):
        call(count=count.long())
    with pytest.raises(TypeError, match="kv_append: k must have the dtype of cache"):
        call(k=k.float(), v=k.float())
    with pytest.raises(ValueError, match="kv_append: k_codes must have shape"):
        call(k_codes=c.storage("k_codes")[..., :-1].contiguous())
    with pytest.raises(ValueError, match="kv_append: layout must have residual, page and ring in multiples of group"):
        call(layout=[4, 64, 1, 0, 64, 0])
    with pytest.raises(ValueError, match="kv_append: bits must be 0, 2, 4 or 8"):
        call(layout=[3, 64, 0, 0, 64, 0])


def test_lengths_do_not_compile_anew():
    code = """
import json, torch, vkernels as vk
from vkernels.triton.aot import key
from vkernels.triton.launch import recording
counts = []
for scheme in ("int4", "bf16"):
    keys = set()
    with recording() as noted:
        for s in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 100, 128, 129, 257, 1000, 1024, 4096):
            cache = vk.KVCache(scheme, b=2, m=8, d=64, capacity=2 * s + 16 * (s % 3))
            k = torch.empty(2, s, 8, 64, dtype=torch.bfloat16)
            cache.append(k, k, backend="triton").append(k, k, backend="triton")
        keys |= set(map(key, noted))
    counts.append([len(noted), len(keys)])
print(json.dumps(counts))
"""
    assert json.loads(python("-c", code)) == [[40, 1], [40, 1]]
