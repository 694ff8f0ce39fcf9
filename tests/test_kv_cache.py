"""KVCache: what it holds, what it refuses, rings, pages, copies."""

from __future__ import annotations

import pytest
import torch

import vkernels as vk


def filled(scheme="int4", length=200, b=2, **options):
    options = {"capacity": 256, **options}
    cache = vk.KVCache(scheme, b=b, m=2, d=64, **options)
    k, v = (torch.randn(b, length, 2, 64).to(cache.dtype) for _ in "kv")
    return cache.append(k, v), k, v


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scheme": "int3"}, "scheme must be one of .*int2, got 'int3'"),
        ({"capacity": 0}, "capacity must be an integer of at least 1, got 0"),
        ({"d": 20}, "d must be a multiple of 8 up to 256, got 20"),
        ({"group": 48}, "group must be one of 32, 64, 128, got 48"),
        ({"residual": 40}, r"residual must be a multiple of group \(64\), got 40"),
        ({"page": 96}, r"page must be a positive multiple of group \(64\) for int4, got 96"),
        ({"page": 64, "ring": True}, "page must be None for a ring, which is stored in one piece, got 64"),
        ({"ring": True, "capacity": 100}, "capacity must be a positive multiple of group"),
        ({"scheme": "bf16", "residual": 64}, "residual must be None or 0 for bf16, which codes nothing, got 64"),
        ({"scheme": "bf16", "sinks": 4}, "sinks must be 0 for bf16 without a ring, which drops nothing, got 4"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, sentence):
    with pytest.raises(ValueError, match=f"KVCache: {sentence}"):
        vk.KVCache(**{"scheme": "int4", "b": 1, "m": 1, "d": 64, "capacity": 128, **change})


def test_ring_keeps_sinks_and_the_newest():
    cache, k, _ = filled("fp32", sinks=3, ring=True, capacity=50)
    assert cache.positions(0) == [0, 1, 2, *range(150, 200)]
    assert torch.equal(cache.dequantised()[0], k[:, cache.positions(0)])


def test_recent_tokens_are_exact():
    cache, k, v = filled(residual=64, sinks=5)
    k_got, v_got = cache.dequantised()
    assert torch.equal(k_got[:, :5], k[:, :5])
    assert torch.equal(k_got[:, -64:], k[:, -64:])
    assert torch.equal(v_got[:, -64:], v[:, -64:])


@pytest.mark.parametrize("scheme", ["fp16", "int2"])
def test_pages_equal_one_piece_and_a_full_pool_refuses(scheme):
    paged, k, v = filled(scheme, page=64)
    plain = vk.KVCache(scheme, b=2, m=2, d=64, capacity=256).append(k, v)
    assert all(torch.equal(a, b) for a, b in zip(paged.dequantised(), plain.dequantised(), strict=True))
    small = vk.KVCache("fp16", b=2, m=2, d=64, capacity=256, page=64, pages=3)
    small.append(k[:, :64].half(), v[:, :64].half())
    with pytest.raises(ValueError, match="kv_append: k must fit the 1 free pages of the pool, got 2 more pages"):
        small.append(k[:, :1].half(), v[:, :1].half())


def test_sequences_of_different_length():
    cache = vk.KVCache("int4", b=2, m=2, d=64, capacity=256, group=32, residual=32)
    k = torch.randn(2, 200, 2, 64, dtype=torch.bfloat16)
    cache.append(k, k, count=[200, 17])
    alone = vk.KVCache("int4", b=1, m=2, d=64, capacity=256, group=32, residual=32).append(k[1:, :17], k[1:, :17])
    assert (cache.length(0), cache.length(1)) == (200, 17)
    assert torch.equal(cache.dequantised()[0][1, :17], alone.dequantised()[0][0])


def test_rows_written_by_someone_else():
    cache, _, _ = filled("bf16", length=10)
    rows = cache.rows(2)
    for row in rows:
        row.fill_(3.0)
    cache.advance(2)
    assert torch.equal(cache.dequantised()[0][:, 10:], torch.full((2, 2, 2, 64), 3.0, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"KVCache.rows: scheme must be of full precision, got int4"):
        filled()[0].rows(1)


def test_clone_reorder_reset():
    cache, _, _ = filled()
    k, _ = cache.dequantised()
    other = cache.clone().reorder([1, 1])
    assert torch.equal(other.dequantised()[0], k[[1, 1]])
    cache.reset()
    assert cache.length() == 0
    assert torch.equal(other.dequantised()[0], k[[1, 1]])


def test_bytes_are_those_of_the_codes():
    cache = vk.KVCache("int4", b=1, m=8, d=128, capacity=4096, group=64, residual=0)
    assert cache.bytes / (2 * 8 * 128 * 4096) * 8 < 4.5 + 16 * 64 / 4096 + 0.01
