"""A mask, a plan or a spec that first served an inference pass serves training afterwards: what it cached then may be
kept for the backward now."""

import pytest
import torch

from vkernels.spec import Maker, all_specs
from vkernels.testing.results import tensors_of

CASES = [(spec, case) for spec in all_specs() if spec.differentiable for case in spec.cases]


@pytest.mark.parametrize(("spec", "case"), [pytest.param(*c, id=f"{c[0].name}-{c[1].id}") for c in CASES])
def test_inference_then_training(spec, case):
    arguments = case.make(Maker())
    backend = next(backend.name for backend in spec.backends if backend.why_not(spec.prepare(**arguments)) is None)
    with torch.inference_mode():
        spec.fn(**arguments, backend=backend)
    for name in spec.differentiable:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = value.clone().requires_grad_()
    outputs = [t for t in tensors_of(spec, spec.fn(**arguments, backend=backend)) if t.requires_grad]
    if outputs:
        sum(t.float().sum() for t in outputs).backward()
