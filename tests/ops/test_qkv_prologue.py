"""qkv_prologue against numbers worked by hand, torch's RMS norm with apply_rope, and its cache form against the other.

Planted and seen red, here or in the derived tests: half of the sum of squares lost, the backward rotation not opposite,
the head stride of the cache ignored, the mean term of the norm's gradient dropped.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vkernels import KVCache, RopeSpec, apply_rope, qkv_prologue, rope_positions

BACKENDS = ["cpu", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
def test_by_hand(backend):
    # q = (3, 4) has mean square 12.5; a quarter turn takes (x, y) to (-y, x). v = bias only.
    r = 1 / math.sqrt(12.5)
    qkv = torch.tensor([3.0, 4.0, 4.0, 3.0, 0.0, 0.0]).view(1, 1, 6)
    bias = torch.tensor([0.0, 0.0, -1.0, 1.0, 5.0, 6.0])
    given = {"n": 1, "m": 1, "spec": RopeSpec((math.pi / 2,)), "pos": torch.tensor([1]), "bias": bias, "norm_eps": 0.0}
    weight = torch.tensor([1.0, 9.0])
    q, k, v = qkv_prologue(qkv, **given, q_norm=weight, norm_offset=1.0, backend=backend)
    assert q.flatten().tolist() == pytest.approx([-4 * r * 10, 3 * r * 2], abs=1e-5)
    assert k.flatten().tolist() == pytest.approx([-4, 3], abs=1e-6)
    assert v.flatten().tolist() == [5, 6]
    q, _, _ = qkv_prologue(qkv, **given, q_norm=weight, norm_offset=1.0, norm_order="post", backend=backend)
    assert q.flatten().tolist() == pytest.approx([-4 * r * 2, 3 * r * 10], abs=1e-5)


@backends
@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_is_rms_norm_and_apply_rope(backend, scope, order):
    torch.manual_seed(0)
    b, s, n, m, d = 2, 7, 6, 2, 72
    spec, pos = RopeSpec.build(64, 1e6, "yarn", factor=4, original=4096, offset=4), torch.randint(0, 999, (1, b, s))
    qkv, bias = torch.randn(b, s, (n + 2 * m) * d), torch.randn((n + 2 * m) * d)
    weights = [torch.randn(heads * d if scope == "all" else d) for heads in (n, m)]

    def norm(x, w):
        rows = x.flatten(2) if scope == "all" else x
        return F.rms_norm(rows, w.shape, w, 1e-6).view_as(x)

    want = list((qkv + bias).unflatten(-1, (-1, d)).split([n, m, m], 2))
    if order == "pre":
        want[:2] = map(norm, want[:2], weights)
    want[:2] = apply_rope(want[0], want[1], spec, pos, backend=backend)
    if order == "post":
        want[:2] = map(norm, want[:2], weights)
    got = qkv_prologue(
        qkv, n=n, m=m, spec=spec, pos=pos, bias=bias, q_norm=weights[0], k_norm=weights[1], norm_order=order,
        norm_scope=scope, backend=backend,
    )  # fmt: skip
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@backends
def test_text_only_mrope_is_one_axis_rope_bit_for_bit(backend):
    qkv, weight = torch.randn(1, 9, 8 * 128), torch.randn(128)
    pos = torch.arange(9) + 1000
    three = RopeSpec.build(128, axes="mrope_interleaved", sections=(24, 20, 20))
    a = qkv_prologue(qkv, n=4, m=2, spec=three, pos=pos.expand(3, -1), q_norm=weight, backend=backend)
    b = qkv_prologue(qkv, n=4, m=2, spec=RopeSpec.build(128), pos=pos, q_norm=weight, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@backends
@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("page", [None, 64])
def test_cache_form_is_the_other_form_and_append(backend, scheme, page):
    dtype = torch.float32 if scheme == "fp32" else torch.bfloat16
    spec = RopeSpec.build(64, axes="mrope", sections=(8, 12, 12))
    caches = [KVCache(scheme, b=2, m=2, d=64, capacity=256, page=page, residual=64 if scheme == "int4" else None)
              for _ in range(2)]  # fmt: skip
    weight = torch.randn(64, dtype=dtype)
    for s in (14, 1, 150):
        qkv, pos = torch.randn(2, s, 8 * 64, dtype=dtype), torch.randint(0, 99, (3, 2, s))
        given = {"n": 4, "m": 2, "spec": spec, "pos": pos, "k_norm": weight, "backend": backend}
        q, k, v = qkv_prologue(qkv, **given)
        caches[0].append(k, v)
        assert torch.equal(qkv_prologue(qkv, **given, cache=caches[1]), q)
    assert caches[0]._lengths == caches[1]._lengths
    for a, b in zip(caches[0].dequantised(), caches[1].dequantised(), strict=True):
        assert torch.equal(a, b)


def test_gradients_do_not_depend_on_the_number_of_threads():
    spec, pos = RopeSpec.build(32), torch.arange(333)
    leaves = [torch.randn(1, 333, 8 * 32), torch.randn(8 * 32), torch.randn(32), torch.randn(32)]
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        x = [leaf.clone().requires_grad_() for leaf in leaves]
        out = qkv_prologue(x[0], n=4, m=2, spec=spec, pos=pos, bias=x[1], q_norm=x[2], k_norm=x[3], backend="cpu")
        results.append(torch.autograd.grad(sum(y.sin().sum() for y in out), x))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@backends
def test_large_outputs_take_the_same_values(backend):
    spec, pos = RopeSpec.build(128, axes="mrope", sections=(16, 24, 24)), rope_positions("qwen2_vl", [(4, 16, 16)])
    s = pos.shape[-1]
    qkv, weight = torch.randn(1, s, 48 * 128), torch.randn(128)
    whole = qkv_prologue(qkv, n=32, m=8, spec=spec, pos=pos, q_norm=weight, backend=backend)
    part = qkv_prologue(qkv[:, -9:], n=32, m=8, spec=spec, pos=pos[..., -9:], q_norm=weight, backend=backend)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:, -9:], b, rtol=0, atol=0)


@backends
def test_cache_refusals(backend):
    cache = KVCache("fp32", b=1, m=1, d=8, capacity=3)
    with pytest.raises(ValueError, match=r"qkv_prologue: k must fit the capacity \(3 tokens\)"):
        qkv_prologue(torch.randn(1, 4, 24), n=1, m=1, cache=cache, backend=backend)
    with pytest.raises(TypeError, match="qkv_prologue: cache must hold the dtype of qkv"):
        qkv_prologue(torch.randn(1, 2, 24).bfloat16(), n=1, m=1, cache=cache, backend=backend)
    with pytest.raises(ValueError, match="qkv_prologue: cache must be None where a gradient is needed"):
        qkv_prologue(torch.randn(1, 2, 24, requires_grad=True), n=1, m=1, cache=cache, backend=backend)
    assert cache.length() == 0


def test_native_refuses_what_python_would():
    run = torch.ops.vkernels.qkv_prologue.cpu
    qkv = torch.randn(1, 2, 24)
    with pytest.raises(ValueError, match="qkv must have size 32 in dimension 2"):
        run(qkv, None, None, None, None, None, None, 1.0, 1e-6, [2, 1, 8, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="q_norm must have size 8"):
        run(qkv, None, torch.ones(7), None, None, None, None, 1.0, 1e-6, [1, 1, 8, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="k must have size 2 in dimension 1"):
        torch.ops.vkernels.qkv_prologue_.cpu(
            qkv, torch.empty(1, 1, 1, 8), torch.empty(1, 2, 1, 8), *[None] * 6, 1.0, 1e-6, [1, 1, 8, 1, 0, 0, 0]
        )
