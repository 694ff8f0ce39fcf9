"""apply_rope against angles worked in long double and in exact fractions, and the laws of rotations.

Planted in the kernel and seen red here: the sine's sign flipped, an inverse that does not turn back, the attention
scale left out, the second half read one element early, every pair on its neighbour's axis.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkernels import RopeSpec, apply_rope
from vkernels.library import cuda_why_not

BACKENDS = ["cpu", "reference"]
if cuda_why_not(torch.empty(0)) is None:
    BACKENDS.append("cuda")  # emulated on the CPU
backends = pytest.mark.parametrize("backend", BACKENDS)


def by_hand(x: torch.Tensor, spec: RopeSpec, pos: np.ndarray) -> np.ndarray:
    """One element at a time in long double; x [s, d], pos [axes, s]."""
    x = x.double().numpy().astype(np.longdouble)
    y = x.copy()
    r, o = spec.pairs, spec.offset
    for s in range(x.shape[0]):
        for j in range(r):
            axis = spec.axis_rows[0][j]
            angle = np.longdouble(0) if axis < 0 else np.longdouble(spec.freq[j]) * np.longdouble(pos[axis][s])
            half = r // max(spec.blocks, 1)
            a = 2 * j if spec.layout == "pair" else j // half * 2 * half + j % half
            b = a + (1 if spec.layout == "pair" else half)
            c, w = np.cos(angle), np.sin(angle)
            y[s, o + a] = spec.scale * (x[s, o + a] * c - x[s, o + b] * w)
            y[s, o + b] = spec.scale * (x[s, o + b] * c + x[s, o + a] * w)
    return y


@backends
@pytest.mark.parametrize("layout", ["half", "pair", "axial"])
@pytest.mark.parametrize("d", [72, 80, 88, 96, 128])
def test_against_long_double(backend, layout, d):
    torch.manual_seed(d)
    spec = RopeSpec.build(d - 16, 1e6, "yarn", factor=4, original=4096, layout=layout, offset=5)
    x, pos = torch.randn(1, 6, 3, d), torch.randint(0, 5000, (1, 6))
    y = apply_rope(x, None, spec, pos, backend=backend)
    for head in range(3):
        want = by_hand(x[0, :, head], spec, pos.numpy())
        assert np.abs(y[0, :, head].double().numpy() - want).max() < 3e-6


@backends
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_a_million_tokens_away(backend, base):
    spec = RopeSpec.build(128, base)
    x = torch.zeros(1, 1, 1, 128)
    x[..., :64] = 1
    for p in (2000, 131071, 1048575, 2**31 - 1):
        y = apply_rope(x, None, spec, torch.tensor([p]), backend=backend)[0, 0, 0].double()
        for j, f in enumerate(spec.freq):
            angle = _reduced(f, p)
            assert abs(y[j].item() - math.cos(angle)) < 1e-6
            assert abs(y[64 + j].item() - math.sin(angle)) < 1e-6


def _reduced(frequency: float, position: int) -> float:
    from fractions import Fraction

    tau = Fraction(6283185307179586476925286766559005768394338798750, 10**48)
    angle = Fraction(frequency) * position
    return float(angle - tau * round(angle / tau))


@backends
def test_one_quarter_turn(backend):
    spec = RopeSpec((math.pi / 2,))
    x = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    y = apply_rope(x, None, spec, torch.tensor([1]), backend=backend)
    assert y.flatten().tolist() == pytest.approx([-4.0, 3.0], abs=1e-6)


@backends
def test_text_only_mrope_is_one_axis_rope_bit_for_bit(backend):
    q, k = torch.randn(1, 9, 4, 128), torch.randn(1, 9, 2, 128)
    three = RopeSpec.build(128, axes="mrope", sections=(16, 24, 24))
    one = RopeSpec.build(128)
    pos = torch.arange(9) + 1000
    a = apply_rope(q, k, three, pos.expand(3, -1), backend=backend)
    b = apply_rope(q, k, one, pos, backend=backend)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@backends
def test_requests_do_not_touch_each_other(backend):
    spec = RopeSpec.build(64, axes="mrope", sections=(8, 12, 12))
    q, pos = torch.randn(3, 5, 2, 64), torch.randint(0, 500, (3, 3, 5))
    together = apply_rope(q, None, spec, pos, backend=backend)
    for i in range(3):
        assert torch.equal(together[i : i + 1], apply_rope(q[i : i + 1], None, spec, pos[:, i], backend=backend))


@backends
@given(shift=st.floats(-1e4, 1e4, width=32), pair=st.booleans(), real=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_scores_depend_on_differences(backend, shift, pair, real, seed):
    generator = torch.Generator().manual_seed(seed)
    spec = RopeSpec.build(32, layout="pair" if pair else "half")
    q, k = (torch.randn(1, 1, 1, 32, generator=generator) for _ in range(2))
    shift = shift if real else float(int(shift))
    a, b = torch.tensor([3.5], dtype=torch.float64), torch.tensor([90.25], dtype=torch.float64)

    def score(c):
        x = apply_rope(q, None, spec, a + c, backend=backend)
        return (x * apply_rope(k, None, spec, b + c, backend=backend)).sum().item()

    assert score(shift) == pytest.approx(score(0.0), abs=2e-5)


@backends
@given(p=st.integers(-(2**31) + 1, 2**31 - 1), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_norm_and_inverse(backend, p, seed):
    spec = RopeSpec.build(24, 1e6, "yarn", factor=4, original=4096, offset=3)
    x = torch.randn(1, 1, 2, 40, generator=torch.Generator().manual_seed(seed))
    y = apply_rope(x, None, spec, torch.tensor([p]), backend=backend)
    assert torch.equal(y[..., :3], x[..., :3])
    assert torch.equal(y[..., 27:], x[..., 27:])
    torch.testing.assert_close(y[..., 3:27].norm(), x[..., 3:27].norm() * spec.scale, rtol=1e-5, atol=0)
    back = apply_rope(y, None, spec, torch.tensor([p]), inverse=True, backend=backend)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


@backends
def test_layouts_are_one_permutation_apart(backend):
    x, pos = torch.randn(1, 4, 2, 64), torch.arange(4) * 7
    half = apply_rope(x, None, RopeSpec.build(64), pos, backend=backend)
    pairs = x.unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2)
    pair = apply_rope(pairs, None, RopeSpec.build(64, layout="pair"), pos, backend=backend)
    torch.testing.assert_close(pair.unflatten(-1, (32, 2)).transpose(-1, -2).flatten(-2), half, rtol=0, atol=1e-6)


@backends
def test_in_place_mutates_and_refuses_gradients(backend):
    spec, pos = RopeSpec.build(36), torch.arange(5)
    q, k = torch.randn(2, 5, 3, 40).transpose(1, 2).contiguous().transpose(1, 2), torch.randn(2, 5, 1, 40)
    want = apply_rope(q, k, spec, pos, backend=backend)
    got = apply_rope(q, k, spec, pos, inplace=True, backend=backend)
    assert got[0] is q
    assert got[1] is k
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])
    with pytest.raises(ValueError, match="apply_rope: inplace must be False where q or k requires grad"):
        apply_rope(q.requires_grad_(), k, spec, pos, inplace=True, backend=backend)


def test_hugging_face_bit_for_bit():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from vkernels.ops.apply_rope.api import angles_of

    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128)
    pos = torch.arange(500)[None] * 7
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), pos)
    spec = RopeSpec.from_hf(config)
    _, c, s = angles_of("apply_rope", spec, pos, "hf_fp32", 1, 500)
    assert torch.equal(cos[..., :64], c)
    assert torch.equal(sin[..., :64], s)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", [RopeSpec.build(16), RopeSpec.grid((8, 4, 4))], ids=["one axis", "three axes"])
def test_a_float32_table_is_the_product_of_float32_numbers(spec, dtype):
    """Bit for bit, whatever holds the positions: they are rounded to float32, then multiplied, then turned to sines.
    Rows of positions that no pair asks for change nothing."""
    pos = (torch.rand(4, 2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2**30 + 0.3).to(dtype)
    axis, freq = spec.float32_tables(pos.device)
    angle = torch.stack([pos[a].float() * f for a, f in zip(axis.tolist(), freq, strict=True)], -1)
    q = torch.randn(2, 9, 1, 16)
    got = apply_rope(q, None, spec, pos, angle="hf_fp32")
    again = apply_rope(q, None, spec, pos, angle="hf_fp32")  # as remembered
    want = apply_rope(q, None, spec, angle=(angle.cos(), angle.sin()))
    assert torch.equal(got, want)
    assert torch.equal(again, want)


def test_native_refuses_what_python_would():
    q = torch.randn(1, 2, 1, 8)
    axis = torch.full((1, 4), 2, dtype=torch.int32)
    freq, pos = torch.ones(4, dtype=torch.int64), torch.zeros(1, 1, 2)
    run = torch.ops.vkernels.apply_rope.cpu
    with pytest.raises(ValueError, match="axis must name an axis of pos"):
        run(q, None, pos, axis, freq, None, None, 1.0, False, [1, 0])
    with pytest.raises(ValueError, match="offset must leave the rotary part inside the head"):
        run(q, None, pos, axis * 0, freq, None, None, 1.0, False, [1, 1])
    with pytest.raises(ValueError, match="pos must be finite"):
        run(q, None, pos + math.inf, axis * 0, freq, None, None, 1.0, False, [1, 0])


@backends
def test_every_pair_follows_its_own_axis(backend):
    """One turn of pi / 2 per unit: the pair of axis 1 turns once, that of axis 2 twice, the others not at all."""
    spec = RopeSpec((math.pi / 2,) * 4, (0, 1, 2, -1), layout="pair")
    x = torch.tensor([1.0, 2.0] * 4).view(1, 1, 1, 8)
    y = apply_rope(x, None, spec, torch.tensor([[0], [1], [2]]), backend=backend)
    want = torch.tensor([1.0, 2.0, -2.0, 1.0, -1.0, -2.0, 1.0, 2.0])
    torch.testing.assert_close(y.flatten(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**31])
@pytest.mark.parametrize("how", [{"backend": "cpu"}, {"backend": "reference"}, {"angle": "hf_fp32"}])
def test_unusable_positions_are_refused_everywhere(value, how):
    pos = torch.tensor([0.0, value, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"apply_rope: pos must be finite and below 2\^31 in magnitude, got"):
        apply_rope(torch.randn(1, 3, 2, 8), None, RopeSpec.build(8), pos, **how)


@backends
def test_longrope_past_the_original_window_with_keys_already_cached(backend):
    """The spec decides, not the positions: nothing switches by itself. Switching under cached keys breaks the scores;
    turning the cached keys back and on again gives what the long spec would have cached."""
    args = {"scheme": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original": 16, "factor": 8.0}
    short, long = RopeSpec.build(16, length=16, **args), RopeSpec.build(16, length=17, **args)
    torch.manual_seed(0)
    q, k, pos = torch.randn(1, 1, 1, 16), torch.randn(1, 24, 1, 16), torch.arange(24)

    cached = apply_rope(k, None, short, pos, backend=backend)
    want = apply_rope(k, None, long, pos, backend=backend)
    plain = RopeSpec.build(16, 1e4).replace(scale=short.scale)
    assert torch.equal(cached, apply_rope(k, None, plain, pos, backend=backend))

    again = apply_rope(apply_rope(cached, None, short, pos, inverse=True, backend=backend), None, long, pos)
    torch.testing.assert_close(again, want, rtol=0, atol=3e-6)

    query = apply_rope(q, None, long, torch.tensor([24]), backend=backend)
    scores, mixed = ((query * keys).sum(-1) for keys in (again, cached))
    torch.testing.assert_close(scores, (query * want).sum(-1), rtol=0, atol=3e-5)
    assert (mixed - scores).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "n", "m"), [(72, 16, 3), (80, 5, 16), (90, 7, 7)])
def test_what_is_written_past_the_caches_is_what_is_written_through_them(dtype, d, n, m):
    """Outputs beyond 8 MB leave in whole lines, token by token; those of a few tokens do not."""
    from vkernels import qkv_prologue

    spec, s = RopeSpec.build(d - 8, offset=5), 7000
    qkv = torch.randn(1, s, (n + 2 * m) * d).to(dtype)
    assert s * max(n, m) * d * dtype.itemsize > 8 << 20
    q, k = qkv[..., : n * d].unflatten(-1, (n, d)), qkv[..., n * d : (n + m) * d].unflatten(-1, (m, d))
    pos, bias = torch.arange(s), torch.randn((n + 2 * m) * d).to(dtype)
    whole = apply_rope(q, k, spec, pos, backend="cpu")
    packed = qkv_prologue(qkv, n=n, m=m, spec=spec, pos=pos, bias=bias, backend="cpu")
    for part in (slice(0, 100), slice(2950, 3050), slice(s - 100, s)):
        few = apply_rope(q[:, part], k[:, part], spec, pos[part], backend="cpu")
        assert all(torch.equal(a[:, part], b) for a, b in zip(whole, few, strict=True))
        few = qkv_prologue(qkv[:, part], n=n, m=m, spec=spec, pos=pos[part], bias=bias, backend="cpu")
        assert all(torch.equal(a[:, part], b) for a, b in zip(packed, few, strict=True))
