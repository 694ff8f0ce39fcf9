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
from vkernels.spec import Maker, all_specs, devices_of
from vkernels.testing import guarded_memory, poisoned_memory, strided
from vkernels.testing.evidence import arguments, assert_gradients, assert_outputs
from vkernels.testing.evidence import outputs as run

SPECS = all_specs()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases(specs, *, registered_only=False):
    """Every case on every device its backend serves here; the device is named only where it is not the CPU."""
    return [
        pytest.param(spec, backend, case, device, id=named(spec, backend, device, case.id))
        for spec in specs
        for backend in spec.backends
        if not (registered_only and backend.name == "reference")
        for device in devices_of(backend.name)
        for case in spec.cases
    ]


def named(spec, backend, device, what):
    return "-".join([spec.name, backend.name, *([] if device == "cpu" else [device]), what])


DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_case = pytest.mark.parametrize(("spec", "backend", "case", "device"), cases(SPECS))
by_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)


def skip_unless_runnable(spec, backend, kwargs):
    reason = backend.why_not(spec.prepare(**kwargs))
    if reason is not None:
        pytest.skip(f"{spec.name}: backend {backend.name} cannot run this call: {reason}")


def runnable(spec, backend, case, device):
    """Arguments the backend runs: float32, or where its kernels take no such (tensor cores), bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        kwargs = arguments(case, dtype, device)
        if dtype in spec.dtypes and backend.why_not(spec.prepare(**kwargs)) is None:
            return kwargs, dtype
    return skip_unless_runnable(spec, backend, arguments(case, torch.float32, device))


@by_case
@dtypes
def test_forward(spec, backend, case, device, dtype):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} takes {spec.dtypes}")
    kwargs = arguments(case, dtype, device)
    skip_unless_runnable(spec, backend, kwargs)
    assert_outputs(spec, backend.name, case, dtype, device)


@pytest.mark.parametrize(("spec", "backend", "case", "device"), cases(DIFFERENTIABLE))
@dtypes
def test_gradient(spec, backend, case, device, dtype):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} takes {spec.dtypes}")
    skip_unless_runnable(spec, backend, arguments(case, dtype, device))
    assert_gradients(spec, backend.name, case, dtype, device)


@by_case
def test_strides_are_honoured(spec, backend, case, device):
    kwargs, dtype = runnable(spec, backend, case, device)
    plain = run(spec, backend.name, kwargs)
    twisted = tree_map(lambda x: strided(x) if isinstance(x, torch.Tensor) else x, arguments(case, dtype, device))
    for a, b in zip(plain, run(spec, backend.name, twisted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_case
def test_memory_is_written_whole_and_only_inside(spec, backend, case, device):
    kwargs, dtype = runnable(spec, backend, case, device)
    plain = run(spec, backend.name, kwargs)
    with poisoned_memory(), guarded_memory():
        guarded = run(spec, backend.name, arguments(case, dtype, device))
    for a, b in zip(plain, guarded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_case
def test_inputs_are_not_changed(spec, backend, case, device):
    kwargs, _ = runnable(spec, backend, case, device)
    before = [x.clone() for x in tree_flatten(kwargs)[0] if isinstance(x, torch.Tensor)]
    run(spec, backend.name, kwargs)
    after = [x for x in tree_flatten(kwargs)[0] if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@by_case
def test_torch_compile_takes_it_whole(spec, backend, case, device):
    kwargs, dtype = runnable(spec, backend, case, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: run(spec, backend.name, kw), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(kwargs), run(spec, backend.name, arguments(case, dtype, device)), strict=True):
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


@pytest.mark.parametrize(("spec", "backend", "case", "device"), cases(SPECS, registered_only=True))
def test_opcheck(spec, backend, case, device):
    kwargs, _ = runnable(spec, backend, case, device)
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
    kwargs = arguments(spec.cases[0], torch.float32)
    with pytest.raises(ValueError, match=f"{spec.name}: backend must be one of .*reference.*, got 'gpu'"):
        spec.fn(**kwargs, backend="gpu")


@by_spec
def test_no_backend_is_silently_replaced(spec):
    kwargs = arguments(spec.cases[0], torch.float32)
    for backend in spec.backends:
        if (reason := backend.why_not(spec.prepare(**kwargs))) is not None:
            with pytest.raises(NoBackend, match=f"{spec.name}: backend {backend.name} cannot run this call"):
                spec.fn(**kwargs, backend=backend.name)
            assert len(reason.split()) > 3


@pytest.mark.parametrize(
    ("spec", "backend", "device", "law"),
    [
        pytest.param(s, b, device, law, id=named(s, b, device, law.__name__))
        for s in SPECS
        for b in s.backends
        for device in devices_of(b.name)
        for law in s.laws
    ],
)
def test_law(spec, backend, device, law):
    skip_unless_runnable(spec, backend, arguments(spec.cases[0], torch.float32, device=device))
    law(backend.name, device)


@pytest.mark.parametrize(("spec", "case"), [pytest.param(s, c, id=f"{s.name}-{c.id}") for s in SPECS for c in s.cases])
def test_cases_follow_their_maker(spec, case):
    """On a device that holds no values: nothing is left behind on the CPU, and the reference waits for no value."""
    kwargs = arguments(case, torch.float32, "meta")
    stray = [name for name, x in kwargs.items() for t in tree_flatten(x)[0] if getattr(t, "is_cpu", False)]
    assert not stray, f"{spec.name}: {stray} must be built on the maker's device"
    assert all(x.device.type == "meta" for x in run(spec, "reference", kwargs))


@by_spec
def test_signature(spec):
    """The public function is `prepare` plus `backend`: no knob reaches one and not the other."""
    public = dict(inspect.signature(spec.fn).parameters)
    assert public.pop("backend").default is None
    assert list(public) == list(inspect.signature(spec.prepare).parameters)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda s: s.name)
def test_reference_gradcheck(spec):
    kwargs = arguments(spec.cases[0], torch.float64)
    names = [n for n in spec.differentiable if isinstance(kwargs.get(n), torch.Tensor)]

    def call(*leaves):
        out = run(spec, "reference", {**kwargs, **dict(zip(names, leaves, strict=True))})
        return tuple(x for x in out if x.is_floating_point())

    leaves = [kwargs[n].detach().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@by_spec
def test_cost_is_stated(spec):
    cost = spec.cost(spec.prepare(**arguments(spec.cases[0], torch.float32)))
    assert cost.bytes > 0
    assert cost.flop >= 0


@by_spec
def test_every_backend_runs_somewhere(spec):
    """`why_not` cannot make the suite green by refusing everything. CUDA kernels that multiply on tensor cores leave
    float32 to Triton."""
    for backend in spec.backends:
        here = (
            backend.name in ("cpu", "reference") or {"triton": INTERPRETED, "cuda": emulator is not None}[backend.name]
        )
        for device in devices_of(backend.name):
            if device == "cuda" or here:
                for dtype in spec.dtypes[1:] if backend.name == "cuda" else spec.dtypes:
                    calls = [spec.prepare(**arguments(case, dtype, device)) for case in spec.cases]
                    reasons = [backend.why_not(call) for call in calls]
                    assert None in reasons, f"{spec.name}.{backend.name} runs no {dtype} case on {device}: {reasons}"
