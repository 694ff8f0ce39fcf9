"""decode_attention against float64 attention over what the cache says it holds, and by hand.

The oracle reads `cache.dequantised` (tested in test_kv_append.py) and nothing of the op's reference.

Trusted after mutation, each planted alone in the kernel and red here: a sign in the product with codes, zeros read
where deltas lie, the zeros of another channel group, a window or a causal end off by one, a running sum or the merge of
pieces not rescaled.
"""

from __future__ import annotations

import math

import pytest
import torch

import vkernels as vk

BACKENDS = ("reference", "cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)
STORES = {
    "plain": {},
    "paged": {"page": 64},
    "ring": {"ring": True, "capacity": 64},
    "sinks": {"sinks": 5},
}


def make(scheme, b, m, d, length, dtype=torch.float32, **options):
    if scheme in ("bf16", "fp32"):
        options = {k: v for k, v in options.items() if k in ("page", "ring", "capacity")}
    else:
        options = {"group": 32, "residual": 32, **options}
    options = {"capacity": max(length, 1), **options}
    cache = vk.KVCache(scheme, b=b, m=m, d=d, dtype=dtype, **options)
    k, v = (torch.randn(b, length, m, d).to(cache.dtype) for _ in "kv")
    return cache.append(k, v, backend="cpu")


def oracle(q, cache, window=None):
    """float64, one query at a time."""
    k, v = cache.dequantised(torch.float64)
    out = torch.zeros(q.shape, dtype=torch.float64)
    b, s, n, d = q.shape
    for i in range(b):
        at = torch.tensor(cache.positions(i), dtype=torch.int64)
        for j in range(s):
            here = cache.length(i) - s + j
            keep = (at <= here) & ((at > here - window) if window else torch.ones_like(at, dtype=torch.bool))
            if not keep.any():
                continue
            for head in range(n):
                kv = head * cache.m // n
                rows = keep.nonzero()[:, 0]
                p = (k[i, rows, kv] @ q[i, j, head].double() / math.sqrt(d)).softmax(0)
                out[i, j, head] = p @ v[i, rows, kv]
    return out


@backends
def test_two_tokens_worked_by_hand(backend):
    cache = vk.KVCache("fp32", b=1, m=1, d=8, capacity=2)
    k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    k[0, 1, 0, 0] = math.log(3.0)
    v[0, 0, 0, 0], v[0, 1, 0, 1] = 4.0, 8.0
    q = torch.zeros(1, 2, 1, 8)
    q[..., 0] = 1.0
    o, lse = vk.decode_attention(q, cache.append(k, v), scale=1.0, return_lse=True, backend=backend)
    # The first query sees token 0 only; the second weighs 1 : 3.
    torch.testing.assert_close(o[0, :, 0, :2], torch.tensor([[4.0, 0.0], [1.0, 6.0]]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([0.0, math.log(4.0)]))


@backends
@pytest.mark.parametrize("length", [0, 1, 7, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "int4", "int2"])
def test_codes_equal_attention_over_decoded_values(scheme, length, backend):
    for n, m, d, s in ((2, 2, 64, 1), (4, 1, 72, 1), (8, 1, 128, 2)):
        cache = make(scheme, 1, m, d, length)
        q = torch.randn(1, s, n, d)
        torch.testing.assert_close(
            vk.decode_attention(q, cache, backend=backend).double(), oracle(q, cache), rtol=1e-5, atol=1e-5
        )


@backends
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "int2"])
def test_stores_and_windows(scheme, store, window, backend):
    cache = make(scheme, 2, 2, 40, 200, **STORES[store])
    q = torch.randn(2, 3, 4, 40)
    got = vk.decode_attention(q, cache, window=window, backend=backend)
    torch.testing.assert_close(got.double(), oracle(q, cache, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["bf16", "int4", "int2"])
def test_thousands_of_keys_in_pieces(scheme):
    cache = make(scheme, 1, 1, 64, 3000)
    q = torch.randn(1, 1, 8, 64)
    torch.testing.assert_close(vk.decode_attention(q, cache).double(), oracle(q, cache), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["bf16", "int4"])
def test_threads_do_not_change_a_bit(scheme):
    cache, q = make(scheme, 1, 2, 64, 2000), torch.randn(1, 1, 4, 64)
    threads = torch.get_num_threads()
    two = vk.decode_attention(q, cache, backend="cpu")
    torch.set_num_threads(1)
    try:
        assert torch.equal(two, vk.decode_attention(q, cache, backend="cpu"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", ["table", "length", "layout", "codes"])
def test_the_native_operator_never_trusts_its_arguments(bad):
    c = make("int4", 1, 1, 64, 200)
    q, length, table, storage, ints = torch.randn(1, 1, 2, 64), c.lengths.clone(), c.table, c.tensors(), c.layout.ints()
    if bad == "table":
        table = table + 1
    elif bad == "length":
        length[0] = 10**6
    elif bad == "layout":
        ints[1] = 64
    else:
        storage[2] = storage[2][:, :, :-1]
    with pytest.raises(ValueError, match=r"decode_attention: \w+ must"):
        torch.ops.vkernels.decode_attention.cpu(q, length, table, *storage, 1.0, 0, ints)
