"""qkv_prologue on Triton: numbers by hand, the CPU kernel at every border of tiles, and tiles that change no bit.

Trusted after mutation, each planted alone and red here or in the derived tests:
a bias that misses what does not turn, a norm after the rotation that takes the scale once, the axes of head 0 for every
head (forward and backward), r r instead of r r r in the norm's gradient, a backward rotation that is not opposite, the
sums of q for k in a norm over all heads, the first heads of k again in the backward, a block of tokens left out of the
sums.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch
from test_triton import python

from vkernels import KVCache, RopeSpec, qkv_prologue

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU kernel, interpreted"),
]

HALF = RopeSpec.build(24, axes="mrope", sections=(3, 4, 5))
KINDS = {
    "half": (24, HALF),
    "inside": (40, RopeSpec.build(24, 1e6, "yarn", factor=4, original=64, offset=9)),
    "pairs": (21, RopeSpec.build(20, layout="pair", offset=1)),
    "axial": (24, RopeSpec.grid((12, 12), layout="axial")),
    "by head": (16, RopeSpec.build(16, axes=((0,) * 8, (-1,) * 4 + (1,) * 4))),
    "none": (17, None),
    "one": (1, None),
}


def given(kind, b, s, n, m, *, norm=None, bias=True, dtype=torch.float32):
    """Arguments; `norm` is (order, scope), or None."""
    d, spec = KINDS[kind]
    arguments = {"qkv": torch.randn(b, s, (n + 2 * m) * d).to(dtype), "n": n, "m": m}
    if spec is not None:
        arguments |= {"spec": spec, "pos": torch.randint(0, 999, (4, b, s))}
    if bias:
        arguments["bias"] = torch.randn((n + 2 * m) * d).to(dtype)
    if norm is not None:
        order, scope = norm
        sizes = (n * d, m * d) if scope == "all" else (d, d)
        arguments |= {"q_norm": torch.randn(sizes[0]), "k_norm": torch.randn(sizes[1])}
        arguments |= {"norm_order": order, "norm_scope": scope, "norm_offset": 0.5}
    return arguments


def outputs_and_gradients(arguments, backend):
    names = [name for name in ("qkv", "bias", "q_norm", "k_norm") if name in arguments]
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    out = qkv_prologue(**{**arguments, **leaves}, backend=backend)
    return [*out, *torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in out), list(leaves.values()))]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # rows past the last token
def test_by_hand():
    # q = (3, 4) has mean square 12.5; a quarter turn takes (x, y) to (-y, x). v = bias only.
    r = 1 / math.sqrt(12.5)
    qkv = torch.tensor([3.0, 4.0, 4.0, 3.0, 0.0, 0.0]).view(1, 1, 6)
    bias = torch.tensor([0.0, 0.0, -1.0, 1.0, 5.0, 6.0])
    same = {"n": 1, "m": 1, "spec": RopeSpec((math.pi / 2,)), "pos": torch.tensor([1]), "bias": bias, "norm_eps": 0.0}
    weight = {"q_norm": torch.tensor([1.0, 9.0]), "norm_offset": 1.0, "backend": "triton"}
    q, k, v = qkv_prologue(qkv, **same, **weight)
    assert q.flatten().tolist() == pytest.approx([-4 * r * 10, 3 * r * 2], abs=1e-5)
    assert k.flatten().tolist() == pytest.approx([-4, 3], abs=1e-6)
    assert v.flatten().tolist() == [5, 6]
    q, _, _ = qkv_prologue(qkv, **same, **weight, norm_order="post")
    assert q.flatten().tolist() == pytest.approx([-4 * r * 2, 3 * r * 10], abs=1e-5)


NORMS = [None, ("pre", "head"), ("post", "head"), ("pre", "all"), ("post", "all")]


@pytest.mark.parametrize(
    ("kind", "norm"),
    [("half", norm) for norm in NORMS]
    + [("by head", None), ("by head", ("post", "all")), ("inside", ("post", "head")), ("inside", ("post", "all"))]
    + [("pairs", ("pre", "head")), ("axial", ("pre", "all")), ("none", ("pre", "head")), ("none", None), ("one", None)],
)
def test_borders(kind, norm):
    """Heads and tokens that fill no tile, forward and backward, as the CPU kernel has them."""
    heads = (6, 2) if kind == "by head" else (5, 3)
    arguments = given(kind, 2, 3, *heads, norm=norm, bias=norm is None or norm[1] == "head")
    for got, want in zip(*(outputs_and_gradients(arguments, backend) for backend in ("triton", "cpu")), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize(
    "row",
    [
        {"BLOCK_S": 1, "BLOCK_H": 1, "PROGRAMS": 1},
        {"BLOCK_S": 2, "BLOCK_H": 4, "PROGRAMS": 1000},
        {"BLOCK_S": 8, "BLOCK_H": 2, "PROGRAMS": 4},
    ],
)
def test_tiles_and_splits_change_no_bit(row):
    from vkernels.triton.tiles import overridden

    arguments = given("half", 1, 9, 5, 3, norm=("pre", "head"))
    want = qkv_prologue(**arguments, backend="triton")
    with overridden("_qkv_prologue_kernel", row):
        got = qkv_prologue(**arguments, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_are_the_same_bits_again_and_no_token_is_missed():
    """Two shares of eight blocks of tokens each have several: none is left out of the sums."""
    from vkernels.triton.tiles import overridden

    arguments = given("half", 2, 4, 3, 1, norm=("pre", "head"))
    with overridden("_qkv_prologue_bwd_kernel", {"BLOCK_S": 1, "BLOCK_H": 2, "PROGRAMS": 8}):
        runs = [outputs_and_gradients(arguments, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for got, want in zip(runs[0], outputs_and_gradients(arguments, "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * max(1.0, want.abs().max().item()))


def test_a_gradient_nobody_laid_out():
    """Expanded and transposed gradients are read as they lie."""
    arguments = given("half", 1, 6, 4, 2)
    results = []
    for backend in ("triton", "cpu"):
        qkv = arguments["qkv"].clone().requires_grad_()
        q, k, v = qkv_prologue(**{**arguments, "qkv": qkv}, backend=backend)
        ((q.transpose(1, 2).sin() * 2).sum() + k.sum() + v[..., ::2].sum()).backward()
        results.append(qkv.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scheme", "page"), [("fp32", None), ("bf16", 32), ("int4", None)])
def test_cache_form_is_the_other_form_and_append(scheme, page):
    dtype = torch.float32 if scheme == "fp32" else torch.bfloat16
    options = {"group": 32, "residual": 0} if scheme == "int4" else {}
    caches = [KVCache(scheme, b=2, m=1, d=24, capacity=96, page=page, **options) for _ in range(2)]
    for s in (3, 1, 31):
        arguments = given("half", 2, s, 2, 1, dtype=dtype)
        q, k, v = qkv_prologue(**arguments, backend="triton")
        caches[0].append(k, v, backend="triton")
        assert torch.equal(qkv_prologue(**arguments, cache=caches[1], backend="triton"), q)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [35, 35]
    for a, b in zip(caches[0].dequantised(), caches[1].dequantised(), strict=True):
        assert torch.equal(a, b)


def test_a_direct_call_is_refused_before_it_could_read_outside():
    run = torch.ops.vkernels.qkv_prologue.triton
    qkv, pos = torch.randn(1, 2, 24), torch.zeros(1, 1, 2, dtype=torch.int64)
    axis, freq = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    end = (1.0, 1e-6)
    with pytest.raises(ValueError, match="qkv_prologue: qkv must have shape"):
        run(qkv, *[None] * 6, *end, [2, 1, 8, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="qkv_prologue: q_norm must have shape"):
        run(qkv, None, torch.ones(7), *[None] * 4, *end, [1, 1, 8, 1, 0, 0, 0])
    with pytest.raises(TypeError, match="qkv_prologue: bias must be contiguous float32"):
        run(qkv, torch.ones(24, dtype=torch.float64), *[None] * 5, *end, [1, 1, 8, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="qkv_prologue: layout must rotate 8 of d=8 elements"):
        run(qkv, None, None, None, pos, axis, freq, *end, [1, 1, 8, 1, 2, 0, 0])
    with pytest.raises(ValueError, match="qkv_prologue: pos must have shape"):
        run(qkv, None, None, None, pos[..., :1], axis, freq, *end, [1, 1, 8, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="qkv_prologue: axis must have a divisor of n=1 and m=1 heads"):
        run(qkv, None, None, None, pos, axis.expand(3, -1), freq, *end, [1, 1, 8, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="qkv_prologue: k must have shape"):
        torch.ops.vkernels.qkv_prologue_.triton(
            qkv, torch.empty(1, 1, 1, 8), torch.empty(1, 2, 1, 8), *[None] * 6, *end, [1, 1, 8, 1, 0, 0, 0]
        )


def test_an_axis_that_is_not_there_does_not_turn():
    qkv = torch.randn(1, 2, 24)
    axis, freq = torch.full((1, 4), 9, dtype=torch.int32), torch.full((4,), 1 << 60)
    pos = torch.ones(1, 1, 2, dtype=torch.int64)
    out = torch.ops.vkernels.qkv_prologue.triton(
        qkv, None, None, None, pos, axis, freq, 1.0, 1e-6, [1, 1, 8, 1, 0, 0, 0]
    )
    assert torch.equal(torch.cat(out, -1).flatten(), qkv.flatten())


def test_lengths_do_not_compile_anew():
    """Twenty lengths, one compilation of each kernel."""
    code = """
import json, torch, vkernels as vk
from vkernels.triton.aot import key
from vkernels.triton.launch import recording
spec, keys = vk.RopeSpec.build(64), set()
weight = torch.ones(64, dtype=torch.bfloat16)
with recording() as noted:
    for s in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 100, 128, 129, 257, 1000, 1024, 4096):
        qkv = torch.empty(2, s, 12 * 64, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = vk.qkv_prologue(
            qkv, n=8, m=2, spec=spec, pos=torch.zeros(2, s), q_norm=weight, k_norm=weight, backend="triton"
        )
        torch.autograd.backward([q, k, v], [torch.empty_like(x) for x in (q, k, v)])
print(json.dumps([len(noted), len(set(map(key, noted)))]))
"""
    assert json.loads(python("-c", code)) == [40, 2]
