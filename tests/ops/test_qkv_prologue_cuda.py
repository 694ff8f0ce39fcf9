"""The CUDA kernels of qkv_prologue, emulated: every width of access, borders of lanes, blocks and shares.

Planted one at a time in csrc/qkv_prologue/{heads.h,qkv_prologue_cuda.cu}, each seen red here. Units: a second piece
that is not there (of what turns, of what does not), what follows the offset placed before it, an angle past the last
pair, angles of other units. Heads: one too many, the first row of axes for all, weights of the first head for all, k's
squares taken for q's. Barriers: angles read before they are there. Backward: turned on instead of back (twice), r r for
r r r, the last group of tokens dropped, all groups after the first, angles filled while they are read or read before
they are there. Sums over heads without their barrier or over the angles. Strides: of samples, tokens and heads, rows or
weights at odd addresses taken for whole.
"""

from __future__ import annotations

import math

import pytest
import torch

from vkernels import KVCache, RopeSpec, library, qkv_prologue
from vkernels.testing import strided

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

RUN = torch.ops.vkernels.qkv_prologue.cuda
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def given(spec, b=1, s=3, n=3, m=2, d=64, *, norm=None, bias=True, dtype=torch.float32, axes=1):
    torch.manual_seed(d)
    arguments = {"qkv": torch.randn(b, s, (n + 2 * m) * d).to(dtype), "n": n, "m": m}
    if spec is not None:
        arguments |= {"spec": spec, "pos": torch.randint(0, 5000, (axes, b, s))}
    if bias:
        arguments["bias"] = torch.randn((n + 2 * m) * d).to(dtype)
    if norm is not None:
        order, scope = norm
        q, k = (n * d, m * d) if scope == "all" else (d, d)
        weights = {"q_norm": torch.randn(q).to(dtype), "k_norm": torch.randn(k).to(dtype)}
        arguments |= {"norm_order": order, "norm_scope": scope, **weights}
    return arguments


def outputs_and_gradients(arguments, backend, lie=lambda x: x):
    """`lie` puts the incoming gradients somewhere else."""
    names = [name for name in ("qkv", "bias", "q_norm", "k_norm") if name in arguments]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}  # as they lie
    out = qkv_prologue(**{**arguments, **leaves}, backend=backend)
    torch.manual_seed(1)
    grads = [lie(torch.randn_like(x)) for x in out]
    return [*out, *torch.autograd.grad(out, list(leaves.values()), grads)]


def close_to_cpu(arguments):
    found = outputs_and_gradients(arguments, "cuda")
    for got, want in zip(found, outputs_and_gradients(arguments, "cpu"), strict=True):
        assert got.dtype == want.dtype
        tolerance = TOLERANCE[arguments["qkv"].dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))
    return found


def test_by_hand():
    # q = (3, 4) has mean square 12.5; a quarter turn takes (x, y) to (-y, x). v = bias only.
    r = 1 / math.sqrt(12.5)
    qkv = torch.tensor([3.0, 4.0, 4.0, 3.0, 0.0, 0.0]).view(1, 1, 6)
    bias = torch.tensor([0.0, 0.0, -1.0, 1.0, 5.0, 6.0])
    same = {"n": 1, "m": 1, "spec": RopeSpec((math.pi / 2,)), "pos": torch.tensor([1]), "bias": bias, "norm_eps": 0.0}
    weight = {"q_norm": torch.tensor([1.0, 9.0]), "norm_offset": 1.0, "backend": "cuda"}
    q, k, v = qkv_prologue(qkv, **same, **weight)
    assert q.flatten().tolist() == pytest.approx([-4 * r * 10, 3 * r * 2], abs=1e-5)
    assert k.flatten().tolist() == pytest.approx([-4, 3], abs=1e-6)
    assert v.flatten().tolist() == [5, 6]
    q, _, _ = qkv_prologue(qkv, **same, **weight, norm_order="post")
    assert q.flatten().tolist() == pytest.approx([-4 * r * 2, 3 * r * 10], abs=1e-5)


LAYOUTS = {
    "halves": (RopeSpec.build(64), 64),
    "halves of four and a half vectors": (RopeSpec.build(72), 72),
    "neighbours": (RopeSpec.build(72, layout="pair"), 72),
    "axial": (RopeSpec.build(64, layout="axial"), 64),
    "part": (RopeSpec.build(32, offset=16), 88),
    "neighbours, part": (RopeSpec.build(24, layout="pair", offset=8), 40),
    "scaled": (RopeSpec.build(16, 1e4, "yarn", factor=4, original=4096), 24),
    "by elements": (RopeSpec.build(6, layout="pair", offset=3), 15),
    "by elements, long": (RopeSpec.build(100, offset=1), 255),
    "nothing": (None, 80),
}


NORMS = [None, ("pre", "head"), ("post", "head"), ("pre", "all"), ("post", "all")]


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [(norm, dtype) for norm in NORMS for dtype in (torch.float32, torch.bfloat16)] + [(NORMS[1], torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_path(layout, norm, dtype):
    spec, d = LAYOUTS[layout]
    close_to_cpu(given(spec, d=d, norm=norm, bias=norm is None or norm[1] == "head", dtype=dtype))


@pytest.mark.parametrize(("s", "n", "m"), [(1, 1, 1), (5, 1, 1), (33, 2, 1), (2, 40, 1), (2, 7, 7), (1, 130, 2)])
def test_borders_of_blocks(s, n, m):
    """Heads and tokens that do not fill the lanes a block has for them; more heads than one block of the backward."""
    close_to_cpu(given(RopeSpec.build(16), b=2 if s < 9 else 1, s=s, n=n, m=m, d=16, norm=("pre", "head")))


def test_more_heads_than_a_block_holds_at_once():
    """With enough tokens to keep every multiprocessor busy, a block goes through its heads batch by batch."""
    arguments = given(RopeSpec.build(64), s=133, n=121, m=3, norm=("pre", "head"))
    want = qkv_prologue(**arguments, backend="cpu")
    for got, w in zip(qkv_prologue(**arguments, backend="cuda"), want, strict=True):
        torch.testing.assert_close(got, w, rtol=2e-5, atol=2e-5)


def test_one_norm_without_the_other():
    arguments = given(RopeSpec.build(16), n=4, m=2, d=16, norm=("pre", "all"))
    for dropped in ("q_norm", "k_norm"):
        close_to_cpu({name: x for name, x in arguments.items() if name != dropped})


def test_axes_of_their_own_for_every_head():
    spec = RopeSpec((0.5, 0.25, 0.125, 0.0625), axis=((0, 1, 0, 1), (1, 1, 0, 0), (-1, 0, 1, 0)))
    for d in (8, 9):
        close_to_cpu(given(spec, s=4, n=6, m=3, d=d, norm=("post", "head"), axes=2))


def among_others(x, first):
    """`x` inside a larger tensor: more tokens than its own in every sample, more columns, from column `first` on."""
    b, s, *rest, d = x.shape
    larger = torch.zeros(b, s + 3, *rest, d + first + 8, dtype=x.dtype)
    larger[:, 2 : 2 + s, ..., first : first + d] = x
    return larger[:, 2 : 2 + s, ..., first : first + d]


@pytest.mark.parametrize("norm", [("pre", "head"), ("pre", "all")], ids=str)
@pytest.mark.parametrize("d", [64, 72])
def test_however_tensors_lie_the_same_bits(d, norm):
    """Rows at addresses of 16 bytes or at odd ones, samples and heads further apart than they are long."""
    arguments = given(RopeSpec.build(d), b=2, s=4, d=d, norm=norm, dtype=torch.bfloat16)
    want = outputs_and_gradients(arguments, "cuda")
    odd = {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    for first in (8, 3):
        odd["qkv"] = among_others(arguments["qkv"], first)
        for lie in (
            lambda x, first=first: among_others(x, first),
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        ):
            for a, b in zip(outputs_and_gradients(odd, "cuda", lie), want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["head", "all"])
def test_weights_at_odd_addresses(norm):
    """float32 vectors that begin 4 bytes after a multiple of 16 are read as they lie."""
    arguments = given(RopeSpec.build(64), norm=("pre", norm))
    want = outputs_and_gradients(arguments, "cuda")
    for name in ("bias", "q_norm", "k_norm"):
        moved = torch.cat([torch.zeros(1), arguments[name]])[1:]
        for a, b in zip(outputs_and_gradients({**arguments, name: moved}, "cuda"), want, strict=True):
            assert torch.equal(a, b)


def test_angles_of_a_second_group_of_tokens():
    """Sixteen rows of axes of 256 elements leave room for the angles of four tokens; a block of the backward has 8."""
    spec = RopeSpec(tuple(0.9**j for j in range(128)), axis=tuple((row % 2,) * 128 for row in range(16)))
    close_to_cpu(given(spec, s=8, n=16, m=16, d=256, axes=2))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_threads_does_not_matter(order):
    arguments = given(RopeSpec.build(64), s=9, n=4, m=1, norm=("pre", "all"), dtype=torch.bfloat16)
    want = outputs_and_gradients(arguments, "cuda")
    library.emulator.module.set_order(order)
    try:
        got = outputs_and_gradients(arguments, "cuda")
    finally:
        library.emulator.module.set_order(3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_shares_of_tokens_leave_none_out(monkeypatch):
    """Few shares of many groups of tokens, and more shares than groups."""
    from vkernels.ops.qkv_prologue import torch_op

    arguments = given(RopeSpec.build(16), s=35, n=2, m=1, d=16, norm=("pre", "head"))
    want = outputs_and_gradients(arguments, "cpu")
    for rows in (1, 2, 7):
        monkeypatch.setattr(torch_op, "_partial_rows", lambda tokens, columns, rows=rows: rows)
        for got, w in zip(outputs_and_gradients(arguments, "cuda"), want, strict=True):
            torch.testing.assert_close(got, w, rtol=2e-5, atol=2e-5 * max(1.0, w.abs().max().item()))


@pytest.mark.parametrize(("scheme", "page"), [("fp32", None), ("bf16", 32)])
def test_cache_form_is_the_other_form_and_append(scheme, page):
    dtype = torch.float32 if scheme == "fp32" else torch.bfloat16
    caches = [KVCache(scheme, b=2, m=1, d=24, capacity=96, page=page) for _ in range(2)]
    for s in (3, 1, 31):
        arguments = given(RopeSpec.build(24), b=2, s=s, n=2, m=1, d=24, dtype=dtype)
        q, k, v = qkv_prologue(**arguments, backend="cuda")
        caches[0].append(k, v, backend="cpu")
        if page is not None:
            continue
        assert torch.equal(qkv_prologue(**arguments, cache=caches[1], backend="cuda"), q)
    if page is None:
        for a, b in zip(*(cache.dequantised() for cache in caches), strict=True):
            assert torch.equal(a, b)


def test_what_does_not_turn_keeps_its_bits():
    qkv = torch.randn(1, 2, 3 * 32)
    qkv[0, 0, 20:24] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-45])
    for offset in (0, 2, 8):
        for layout in ("half", "pair"):
            spec = RopeSpec.build(8, offset=offset, layout=layout)
            q, _, v = qkv_prologue(qkv, n=1, m=1, spec=spec, pos=torch.arange(2), backend="cuda")
            assert torch.equal(
                q[..., offset + 8 :].view(torch.int32), qkv[:, :, None, offset + 8 : 32].view(torch.int32)
            )
            assert torch.equal(v.flatten(2), qkv[..., 64:])


def test_an_axis_that_is_not_there_does_not_turn():
    qkv, pos = torch.randn(1, 2, 24), torch.ones(1, 1, 2, dtype=torch.int64)
    for axis in (-1, 1, 9, 2**31 - 1, -(2**31)):
        rows, freq = torch.full((1, 4), axis, dtype=torch.int32), torch.full((4,), 1 << 60)
        out = RUN(qkv, None, None, None, pos, rows, freq, 1.0, 1e-6, [1, 1, 8, 1, 0, 0, 0])
        assert torch.equal(torch.cat(out, -1).flatten(), qkv.flatten())


def test_calls_for_other_backends_are_refused_in_sentences():
    with pytest.raises(library.NoBackend, match="heads have 264 elements, this backend serves up to 256"):
        qkv_prologue(torch.randn(1, 1, 3 * 264), n=1, m=1, backend="cuda")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({10: None, 9: [2, 1, 8, 1, 0, 0, 0]}, "qkv must have size 32 in dimension 2"),
        ({2: torch.ones(7)}, "q_norm must have size 8"),
        ({1: torch.ones(24, dtype=torch.float64)}, "bias must have dtype code 0"),
        ({9: [1, 1, 8, 1, 2, 0, 0]}, "offset must leave the rotary part inside the head"),
        ({4: torch.zeros(1, 1, 1)}, "pos must have size 2 in dimension 2"),
        ({5: torch.zeros(3, 4, dtype=torch.int32)}, "axis must have a divisor of n and m heads"),
        ({0: torch.randn(1, 2, 3 * 257), 9: [1, 1, 257, 1, 0, 0, 0]}, "layout must have heads of at most 256 elements"),
    ],
)
def test_a_direct_call_is_refused_before_it_could_read_outside(change, match):
    spec = RopeSpec.build(8)
    arguments = [torch.randn(1, 2, 24), None, None, None, torch.zeros(1, 1, 2), *spec.tables(torch.device("cpu")), 1.0]
    arguments += [1e-6, [1, 1, 8, 1, 0, 0, 0]]
    for i, value in change.items():
        if i < len(arguments):
            arguments[i] = value
    with pytest.raises(ValueError, match=f"qkv_prologue: {match}"):
        RUN(*arguments)


def test_the_backward_refuses_sums_it_cannot_fill():
    run = torch.ops.vkernels.qkv_prologue_bwd.cuda
    qkv, head = torch.randn(1, 2, 24), torch.randn(1, 2, 1, 8)
    with pytest.raises(ValueError, match="qkv_prologue: k must have size 1 in dimension 2"):
        run(qkv, head, head.expand(-1, -1, 2, -1), head, *[None] * 6, 1.0, 1e-6, [1, 1, 8, 1, 0, 0, 0])
