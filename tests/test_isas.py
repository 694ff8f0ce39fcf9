"""Every instruction set this machine can run owes what the best one owes: outputs and gradients inside the policy.

The truth and the eager result are computed once per case; every kernel is then run under each forced set. Where one
set is broken (a bfloat16 load, a masked tail), the other tests see it only if that set happens to be the best here.
"""

from __future__ import annotations

import pytest
import torch
from test_every_op import skip_unless_runnable

import vkernels as vk
from vkernels.library import native, native_missing
from vkernels.spec import all_specs
from vkernels.testing import assert_gradient, assert_within_budget
from vkernels.testing.evidence import arguments, gradients, outputs

if native_missing() is not None:
    pytest.skip(native_missing(), allow_module_level=True)

CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.id}")
    for spec in all_specs()
    if any(backend.name == "cpu" for backend in spec.backends)
    for case in spec.cases
]


@pytest.fixture
def each_isa():
    """Yields the usable sets one after the other, each forced; the active one is put back whatever happens."""
    before = native().isa_active()

    def forced():
        for isa in native().isa_usable():
            native().isa_force(isa)
            assert native().isa_active() == isa
            yield isa

    yield forced
    native().isa_force(before)


@pytest.mark.parametrize(("spec", "case"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_instruction_set(spec, case, dtype, each_isa):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} takes {spec.dtypes}")
    cpu = next(backend for backend in spec.backends if backend.name == "cpu")
    skip_unless_runnable(spec, cpu, arguments(case, dtype))
    eager = outputs(spec, "reference", arguments(case, dtype))
    truth = eager if spec.exact else outputs(spec, "reference", arguments(case, torch.float64))
    eager_grad = gradients(spec, "reference", case, dtype, "cpu") if spec.differentiable else {}
    true_grad = gradients(spec, "reference", case, torch.float64, "cpu") if spec.differentiable else {}
    for isa in each_isa():
        got = outputs(spec, "cpu", arguments(case, dtype))
        for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
            if spec.exact:
                assert torch.equal(g, e), f"{isa}: output {i}"
            else:
                assert_within_budget(g, e, t, f"{isa}: output {i}", spec.band[0])
        got_grad = gradients(spec, "cpu", case, dtype, "cpu") if spec.differentiable else {}
        assert got_grad.keys() == true_grad.keys()
        for name, g in got_grad.items():
            assert_gradient(g, eager_grad[name], true_grad[name], f"{isa}: d{name}")


@pytest.mark.parametrize("d", [64, 40])
def test_more_keys_than_fit_a_chunk(d, each_isa):
    """bfloat16 keys come in chunks of 2,048 at this head size, larger than the cases': sums are kept between two."""
    torch.manual_seed(d)
    grid = vk.Grid(47, 7, 7)
    q, k, v = (torch.randn(1, grid.tokens, heads, d).to(torch.bfloat16) for heads in (2, 1, 1))
    mask = vk.VideoMask.frame_causal(grid)
    rows = torch.tensor([0, 48, 49, 1500, 2047, 2048, 2100, grid.tokens - 1])
    truth = vk.attention(q.double(), k.double(), v.double(), mask=mask, backend="reference")[:, rows]
    eager = vk.attention(q, k, v, mask=mask, backend="reference")[:, rows]
    for isa in each_isa():
        got = vk.attention(q, k, v, mask=mask, backend="cpu")[:, rows]
        assert_within_budget(got, eager, truth, isa)


@pytest.mark.parametrize(("d", "cls", "order"), [(24, 1, "patch"), (64, 1, "frame"), (88, 0, "frame")])
def test_frames_of_many_tokens(d, cls, order, each_isa):
    """With matrix tiles long groups take another kernel; the cases' groups are short."""
    torch.manual_seed(d)
    grid = vk.Grid(3, 8, 9)
    q, k, v = (torch.randn(2, cls + grid.tokens, heads, d).to(torch.bfloat16) for heads in (4, 2, 2))
    options = {"grid": grid, "axis": "spatial", "cls": cls, "order": order, "scale": 0.2}
    truth = vk.divided_attention(q.double(), k.double(), v.double(), **options, backend="reference")
    eager = vk.divided_attention(q, k, v, **options, backend="reference")
    for isa in each_isa():
        assert_within_budget(vk.divided_attention(q, k, v, **options, backend="cpu"), eager, truth, isa)
