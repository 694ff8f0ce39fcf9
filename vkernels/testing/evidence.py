"""What one case of a spec proves about one backend on one device: its outputs and gradients against float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vkernels.testing.numerics import assert_gradient, assert_within_budget
from vkernels.testing.results import tensors_of

if TYPE_CHECKING:
    from vkernels.spec import Case, OpSpec

Device = torch.device | str


def arguments(case: Case, dtype: torch.dtype, device: Device = "cpu") -> dict[str, Any]:
    from vkernels.spec import Maker

    return case.make(Maker(dtype, device))


def outputs(spec: OpSpec, backend: str, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return tensors_of(spec, spec.fn(**kwargs, backend=backend))


def gradients(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype, device: Device) -> dict[str, torch.Tensor]:
    """Outputs' random projection, differentiated. The projection is the same for every dtype and backend."""
    from vkernels.spec import Maker

    kwargs = arguments(case, dtype, device)
    leaves = {}
    for name in spec.differentiable:
        if isinstance(kwargs.get(name), torch.Tensor):
            leaves[name] = kwargs[name] = kwargs[name].detach().requires_grad_()
    made = [x for x in outputs(spec, backend, kwargs) if x.is_floating_point() and x.requires_grad]
    maker = Maker(torch.float64, device, seed=1)
    total = sum((x.double() * maker.randn(*x.shape)).masked_fill(~torch.isfinite(x), 0).sum() for x in made)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)) if leaves else {}  # type: ignore[arg-type]


def assert_outputs(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype, device: Device = "cpu") -> None:
    """A pure move is equal bit by bit; everything else stays within the budget of docs/numerics.md."""
    got = outputs(spec, backend, arguments(case, dtype, device))
    assert all(x.device.type == torch.device(device).type for x in got), f"outputs must be on {device}"
    eager = outputs(spec, "reference", arguments(case, dtype, device))
    assert len(got) == len(eager), f"{len(got)} outputs, want {len(eager)}"
    if spec.exact:
        for i, (g, e) in enumerate(zip(got, eager, strict=True)):
            assert g.dtype == e.dtype, f"output {i}: dtype {g.dtype}, want {e.dtype}"
            assert torch.equal(g, e), f"output {i}: differs from the reference, which it must equal"
        return
    truth = outputs(spec, "reference", arguments(case, torch.float64, device))
    for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert_within_budget(g, e, t, f"output {i}", spec.band[0])


def assert_gradients(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype, device: Device = "cpu") -> None:
    got = gradients(spec, backend, case, dtype, device)
    eager = gradients(spec, "reference", case, dtype, device)
    truth = gradients(spec, "reference", case, torch.float64, device)
    for name in got:
        assert_gradient(got[name], eager[name], truth[name], f"d{name}")
