"""Derived from the specs: what every op owes on every backend, dtype and case.

Trusted after mutation: a flipped sign, a dropped mask, a lie in a fake and an off-by-one in a kernel were each planted
and turned this file red. It is blind to a reference and a kernel that are wrong together; tests/ops/ is not.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from vkernels import NoBackend
from vkernels.library import INTERPRETED, emulator
from vkernels.spec import Maker, all_specs
from vkernels.testing import assert_gradient, assert_within_budget, guarded_memory, poisoned_memory, strided
from vkernels.testing.results import tensors_of

SPECS = all_specs()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases(specs, *, registered_only=False):
    return [
        pytest.param(spec, backend, case, id=f"{spec.name}-{backend.name}-{case.id}")
        for spec in specs
        for backend in spec.backends
        if not (registered_only and backend.name == "reference")
        for case in spec.cases
    ]


DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_case = pytest.mark.parametrize(("spec", "backend", "case"), cases(SPECS))
by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)


def skip_unless_runnable(spec, backend, kwargs):
    reason = backend.why_not(spec.prepare(**kwargs))
    if reason is not None:
        pytest.skip(f"{spec.name}: backend {backend.name} cannot run this call: {reason}")


def run(spec, backend, kwargs):
    return tensors_of(spec, spec.fn(**kwargs, backend=backend))


def make(case, dtype, **maker):
    return case.make(Maker(dtype, **maker))


def gradients(spec, backend, case, dtype):
    """Outputs' random projection, differentiated. The projection is the same for every dtype and backend."""
    kwargs = make(case, dtype)
    leaves = {}
    for name in spec.differentiable:
        if isinstance(kwargs.get(name), torch.Tensor):
            leaves[name] = kwargs[name] = kwargs[name].detach().requires_grad_()
    outputs = [x for x in run(spec, backend, kwargs) if x.is_floating_point() and x.requires_grad]
    maker = Maker(torch.float64, seed=1)
    total = sum((x.double() * maker.randn(*x.shape)).masked_fill(~torch.isfinite(x), 0).sum() for x in outputs)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)) if leaves else {}


@by_case
@dtypes
def test_forward(spec, backend, case, dtype):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} takes {spec.dtypes}")
    kwargs = make(case, dtype)
    skip_unless_runnable(spec, backend, kwargs)
    got = run(spec, backend.name, kwargs)
    eager = run(spec, "reference", make(case, dtype))
    if spec.exact:
        assert len(got) == len(eager)
        for g, e in zip(got, eager, strict=True):
            assert g.dtype == e.dtype
            assert torch.equal(g, e)
        return
    truth = run(spec, "reference", make(case, torch.float64))
    assert len(got) == len(truth)
    for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert_within_budget(g, e, t, f"output {i}", spec.band[0])


@pytest.mark.parametrize(("spec", "backend", "case"), cases(DIFFERENTIABLE))
@dtypes
def test_gradient(spec, backend, case, dtype):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} takes {spec.dtypes}")
    skip_unless_runnable(spec, backend, make(case, dtype))
    got = gradients(spec, backend.name, case, dtype)
    eager = gradients(spec, "reference", case, dtype)
    truth = gradients(spec, "reference", case, torch.float64)
    for name in got:
        assert_gradient(got[name], eager[name], truth[name], f"d{name}")


@by_case
def test_strides_are_honoured(spec, backend, case):
    kwargs = make(case, torch.float32)
    skip_unless_runnable(spec, backend, kwargs)
    plain = run(spec, backend.name, kwargs)
    twisted = tree_map(lambda x: strided(x) if isinstance(x, torch.Tensor) else x, make(case, torch.float32))
    for a, b in zip(plain, run(spec, backend.name, twisted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_case
def test_memory_is_written_whole_and_only_inside(spec, backend, case):
    kwargs = make(case, torch.float32)
    skip_unless_runnable(spec, backend, kwargs)
    plain = run(spec, backend.name, kwargs)
    with poisoned_memory(), guarded_memory():
        guarded = run(spec, backend.name, make(case, torch.float32))
    for a, b in zip(plain, guarded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_case
def test_inputs_are_not_changed(spec, backend, case):
    kwargs = make(case, torch.float32)
    skip_unless_runnable(spec, backend, kwargs)
    before = [x.clone() for x in tree_flatten(kwargs)[0] if isinstance(x, torch.Tensor)]
    run(spec, backend.name, kwargs)
    after = [x for x in tree_flatten(kwargs)[0] if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@by_case
def test_torch_compile_takes_it_whole(spec, backend, case):
    kwargs = make(case, torch.float32)
    skip_unless_runnable(spec, backend, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: run(spec, backend.name, kw), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(kwargs), run(spec, backend.name, make(case, torch.float32)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of our own operators, for opcheck."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vkernels":
            self.calls.append((func, copy.copy(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("spec", "backend", "case"), cases(SPECS, registered_only=True))
def test_opcheck(spec, backend, case):
    kwargs = make(case, torch.float32)
    skip_unless_runnable(spec, backend, kwargs)
    with _Recorder() as recorder:
        run(spec, backend.name, kwargs)
    assert recorder.calls, f"{spec.name}.{backend.name} registered no operator"
    for func, args, keywords in recorder.calls:
        floats = [
            a.detach().clone().requires_grad_(bool(spec.differentiable) and i == 0)
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for i, a in enumerate(args)
        ]
        torch.library.opcheck(func, tuple(floats), keywords)


@pytest.mark.parametrize(
    ("spec", "reject"), [pytest.param(s, r, id=f"{s.name}-{r.id}") for s in SPECS for r in s.rejects]
)
def test_refuses_with_a_sentence(spec, reject):
    with pytest.raises(reject.error, match=reject.match):
        spec.fn(**reject.make(Maker()))


@by_spec
def test_unknown_backend_is_refused(spec):
    kwargs = make(spec.cases[0], torch.float32)
    with pytest.raises(ValueError, match=f"{spec.name}: backend must be one of .*reference.*, got 'gpu'"):
        spec.fn(**kwargs, backend="gpu")


@by_spec
def test_no_backend_is_silently_replaced(spec):
    kwargs = make(spec.cases[0], torch.float32)
    for backend in spec.backends:
        if (reason := backend.why_not(spec.prepare(**kwargs))) is not None:
            with pytest.raises(NoBackend, match=f"{spec.name}: backend {backend.name} cannot run this call"):
                spec.fn(**kwargs, backend=backend.name)
            assert len(reason.split()) > 3


@pytest.mark.parametrize(
    ("spec", "backend", "law"),
    [
        pytest.param(s, b, law, id=f"{s.name}-{b.name}-{law.__name__}")
        for s in SPECS
        for b in s.backends
        for law in s.laws
    ],
)
def test_law(spec, backend, law):
    skip_unless_runnable(spec, backend, make(spec.cases[0], torch.float32))
    law(backend.name)


@by_spec
def test_signature(spec):
    """The public function is `prepare` plus `backend`: no knob reaches one and not the other."""
    public = dict(inspect.signature(spec.fn).parameters)
    assert public.pop("backend").default is None
    assert list(public) == list(inspect.signature(spec.prepare).parameters)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda s: s.name)
def test_reference_gradcheck(spec):
    kwargs = make(spec.cases[0], torch.float64)
    names = [n for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor)]

    def call(*leaves):
        out = run(spec, "reference", {**kwargs, **dict(zip(names, leaves, strict=True))})
        return tuple(x for x in out if x.is_floating_point())

    leaves = [kwargs[n].detach().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@by_spec
def test_cost_is_stated(spec):
    cost = spec.cost(spec.prepare(**make(spec.cases[0], torch.float32)))
    assert cost.bytes > 0
    assert cost.flop >= 0


@by_spec
def test_every_backend_runs_somewhere(spec):
    """`why_not` cannot make the suite green by refusing everything."""
    for backend in spec.backends:
        emulated = backend.name == "cuda" and emulator is not None
        if backend.name in ("cpu", "reference") or (backend.name == "triton" and INTERPRETED) or emulated:
            for dtype in spec.dtypes:
                reasons = [backend.why_not(spec.prepare(**make(case, dtype))) for case in spec.cases]
                assert None in reasons, f"{spec.name}.{backend.name} runs no {dtype} case: {reasons}"
