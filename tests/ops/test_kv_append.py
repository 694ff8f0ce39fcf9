"""kv_append, worked by hand and by laws. Nothing here asks the reference for the answer, except where both must agree
bit for bit.

Trusted after mutation, each planted alone in the kernel and red here: a sign in the quantiser, a zero rounded up,
delta stored as zero, a window that keeps one token too few or starts one too late, a ring that drops one too many, a
residual that ends one token early.
"""

from __future__ import annotations

import pytest
import torch

import vkernels as vk
from vkernels.kv_cache import STORAGE

BACKENDS = ("reference", "cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)
SCHEMES = {
    "int8": {"group": 32, "residual": 32},
    "int4": {"group": 32, "residual": 64, "sinks": 3},
    "int2": {"group": 64, "residual": 64},
    "bf16": {},
}


@backends
def test_codes_and_bytes_worked_by_hand(backend):
    cache = vk.KVCache("int4", b=1, m=1, d=8, capacity=32, group=32, residual=0, dtype=torch.float32)
    # Channel c of token t holds (t + c) % 16: every channel spans 0..15, so delta = 1, zero = 0, code = value.
    k = ((torch.arange(32)[:, None] + torch.arange(8)) % 16).float()[None, :, None]
    # Token t holds t + 2 c: 8 channels span 14, delta = fp16 above 14 / 15, zero = t.
    v = (torch.arange(32)[:, None] + 2 * torch.arange(8)).float()[None, :, None]
    cache.append(k, v, backend=backend)
    # Token 0 holds channels 0..7 = codes 0..7, lowest nibble first; token 9 holds 9 10 11 12 13 14 15 0.
    assert cache.k_codes[0, 0, 0, 0, 0].item() == 0x76543210
    assert cache.k_codes[0, 0, 0, 0, 9].item() == 0x0FEDCBA9
    assert cache.k_scale[0, 0, 0, 0].tolist() == [1.0] * 8
    assert cache.k_scale[0, 0, 0, 1].tolist() == [0.0] * 8
    # Codes round(2 c / delta), delta just above 0.9333: 0 2.14 4.29 6.43 8.57 10.7 12.9 15 -> 0 2 4 6 9 11 13 15, the
    # same for every token, so channel c of word 0 (tokens 0..7) repeats its digit eight times.
    digits = [0x00000000, 0x22222222, 0x44444444, 0x66666666, 0x99999999, 0xBBBBBBBB, 0xDDDDDDDD, 0xFFFFFFFF]
    assert [word % 2**32 for word in cache.v_codes[0, 0, 0, 0, :8].tolist()] == digits
    assert cache.v_scale[0, 0, 0, 1, 0].tolist() == list(range(32))
    assert 14 / 15 <= cache.v_scale[0, 0, 0, 0, 0, 0].item() < 14 / 15 + 2**-10


@backends
@pytest.mark.parametrize("scheme", SCHEMES)
def test_token_by_token_equals_bulk_at_every_length(scheme, backend):
    options = SCHEMES[scheme]
    longest = 3 * max(options.get("residual", 0), 32) + 5
    make = lambda: vk.KVCache(scheme, b=1, m=1, d=24, capacity=longest, **options)  # noqa: E731
    slow = make()
    k, v = (torch.randn(1, longest, 1, 24).to(slow.dtype) for _ in "kv")
    for length in range(1, longest + 1):
        slow.append(k[:, length - 1 : length], v[:, length - 1 : length], backend=backend)
        if backend == "reference" and length % 16 > 1:
            continue
        bulk = make().append(k[:, :length], v[:, :length], backend=backend)
        for a, b in zip(slow.dequantised(), bulk.dequantised(), strict=True):
            assert torch.equal(a, b), length
        for name in STORAGE[:6]:
            a, b = getattr(slow, name), getattr(bulk, name)
            assert a is None or torch.equal(a, b), (name, length)


@pytest.mark.parametrize("d", [8, 72, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backends_store_the_same_bits(scheme, d, dtype):
    caches = [vk.KVCache(scheme, b=2, m=2, d=d, capacity=300, dtype=dtype, **SCHEMES[scheme]) for _ in BACKENDS]
    k, v = (torch.randn(2, 300, 2, d).to(caches[0].dtype) for _ in "kv")
    k[:, :, 0, 3] = 2.5
    for backend, cache in zip(BACKENDS, caches, strict=True):
        cache.append(k[:, :140], v[:, :140], backend=backend).append(k[:, 140:], v[:, 140:], backend=backend)
    for name in STORAGE:
        a, b = (getattr(cache, name) for cache in caches)
        assert a is None or torch.equal(a, b), name


@backends
@pytest.mark.parametrize("offset", [0.0, 300.0, 60000.0])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int2"])
def test_error_is_at_most_half_a_step(scheme, offset, backend):
    cache = vk.KVCache(scheme, b=1, m=1, d=64, capacity=64, residual=0, dtype=torch.float32)
    k, v = (torch.randn(1, 64, 1, 64) + offset for _ in "kv")
    cache.append(k, v, backend=backend)
    k_got, v_got = cache.dequantised(torch.float64)
    k_step = cache.k_scale[0, 0, 0, 0].double()[None]
    v_step = cache.v_scale[0, 0, 0, 0, 0].double()[:, None]
    slack = 1e-5 + 1e-6 * offset
    assert ((k_got[0, :, 0] - k[0, :, 0]).abs() <= k_step / 2 * (1 + 1e-5) + slack).all()
    assert ((v_got[0, :, 0] - v[0, :, 0]).abs() <= v_step / 2 * (1 + 1e-5) + slack).all()


@backends
def test_constant_channel_is_exact(backend):
    cache = vk.KVCache("int2", b=1, m=1, d=8, capacity=64, residual=0, dtype=torch.float32)
    k = torch.full((1, 64, 1, 8), -1.5)
    assert torch.equal(cache.append(k, k, backend=backend).dequantised()[0], k)


@backends
def test_infinity_saturates_and_nan_stays_in_its_group(backend):
    cache = vk.KVCache("int4", b=1, m=1, d=64, capacity=64, residual=0, dtype=torch.float32)
    k = torch.randn(1, 64, 1, 64)
    v = k.clone()
    k[0, 5, 0, 2], k[0, 6, 0, 3], v[0, 7, 0, 1] = float("nan"), float("inf"), float("nan")
    k_got, v_got = cache.append(k, v, backend=backend).dequantised()
    assert k_got[0, :, 0, 2].isnan().all()
    assert k_got[0, :, 0, [i for i in range(64) if i != 2]].isfinite().all()
    assert k_got[0, 6, 0, 3] > 65000
    assert v_got[0, 7].isnan().all()
    assert v_got[0, [i for i in range(64) if i != 7]].isfinite().all()


def test_bad_input_is_refused():
    cache = vk.KVCache("int4", b=2, m=2, d=64, capacity=64)
    k = torch.zeros(2, 65, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"kv_append: k must fit the capacity \(64 tokens\), got 65 tokens"):
        cache.append(k, k)
    assert cache.length() == 0
    with pytest.raises(TypeError, match="kv_append: k must have the dtype of the cache"):
        cache.append(k.float(), k.float())
    with pytest.raises(ValueError, match="kv_append: count must be 2 numbers of tokens up to 3, got"):
        cache.append(k[:, :3], k[:, :3], count=[1, 4])
    with pytest.raises(vk.ShapeError, match="kv_append: v must have shape"):
        cache.append(k[:, :3], k[:, :2])


@pytest.mark.parametrize("bad", ["table", "length", "count", "layout"])
def test_the_native_operator_never_trusts_its_arguments(bad):
    c = vk.KVCache("int4", b=1, m=1, d=64, capacity=128, residual=0)
    k = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16)
    count, length, table, layout = torch.tensor([64], dtype=torch.int32), c.lengths.clone(), c.table.clone(), c.layout
    ints = layout.ints()
    if bad == "table":
        table[0, 0] = 7
    elif bad == "length":
        length[0] = 2**30
    elif bad == "count":
        count[0] = 65
    else:
        ints[4] = 1 << 20
    with pytest.raises(ValueError, match=r"kv_append: \w+ must"):
        torch.ops.vkernels.kv_append.cpu(k, k, count, length, table, *c.tensors(), ints)


@pytest.mark.parametrize("scheme", ["int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_too_strange_to_be_coded_alike(scheme, dtype):
    """Beyond float16, infinite, NaN, signed zeros, all alike: the kernel stores the reference's bits."""
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(1, 192, 2, 72, generator=generator) for _ in "kv")
    for x in (k, v):
        for at, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0, 1e38, 3e-8)):
            x[torch.rand(x.shape, generator=generator) < (0.0005 if at == 0 else 0.002)] = value
        x[:, :64] = x[:, :1]
    stored = []
    for backend in BACKENDS:
        cache = vk.KVCache(scheme, b=1, m=2, d=72, capacity=192, group=64, residual=0, dtype=dtype)
        cache.append(k.to(dtype), v.to(dtype), backend=backend)
        codes, scales = (cache.k_codes, cache.v_codes), (cache.k_scale, cache.v_scale)
        stored.append([*codes, *(x.nan_to_num(7.0) for x in scales), *(x.isnan() for x in scales)])
    for expected, got in zip(*stored, strict=True):
        assert torch.equal(expected, got)
    assert stored[0][-1].any()
    assert not stored[0][-1].all()
