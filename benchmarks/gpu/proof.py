"""Every op on the GPU against float64: its spec's cases in every dtype, gradients too, and its real sizes; a call
of each as a CUDA graph; plans of masks against those of the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import drawn_there, with_contents
from benchmarks.gpu.supervise import emit
from vkernels.bench.clock import captured
from vkernels.bench.problem import Problem, without_gradients
from vkernels.masks import spec as masks
from vkernels.spec import Blank, Case, Maker, OpSpec, Shape
from vkernels.testing.evidence import arguments, assert_gradients, assert_outputs
from vkernels.testing.results import tensors_of

FATAL = (
    "illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address",
    "illegal instruction",
)  # fmt: skip
NO_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)


def backends(spec: OpSpec, device: str) -> list[str]:
    """Those whose kernels this device runs; the reference on a GPU is eager PyTorch and proves nothing."""
    own = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "triton")}[torch.device(device).type]
    return [backend.name for backend in spec.backends if backend.name in own]


def refused(spec: OpSpec, backend: str, kwargs: dict[str, Any]) -> str | None:
    """Why `backend` cannot run this call, None where it can."""
    why_not = next(b.why_not for b in spec.backends if b.name == backend)
    return why_not(spec.prepare(**kwargs))


Report = Callable[[dict[str, Any]], None]
Trial = Callable[[], tuple[str, str]]  # ("passed" | "failed" | "skipped", why)


def prove(spec: OpSpec, cases: list[Case], device: str, skip: Collection[str] = (), report: Report = emit) -> None:
    """One report per case, backend and dtype: {"op", "id", "status": "passed" | "failed" | "skipped", "why"}. On a GPU
    also a call of each backend as a CUDA graph."""
    trials: dict[str, Trial] = {}
    for backend in backends(spec, device):
        for case in cases:
            for dtype in case.dtypes if isinstance(case, Shape) else spec.dtypes:
                name = f"{spec.name}/{backend}/{case.id}/{str(dtype).removeprefix('torch.')}"
                trials[name] = partial(_one, spec, backend, case, dtype, device)
        small = [case for case in cases if not isinstance(case, Shape)]
        if torch.device(device).type == "cuda" and small:
            trials[f"{spec.name}/{backend}/captured"] = partial(capture_one, spec, backend, small, device)
    _report_each(spec.name, trials, skip, report)


def prove_masks(cases: list[Case], device: str, skip: Collection[str] = (), report: Report = emit) -> None:
    """Plans lowered on the device, against those of torch operations on the host: equal in every element."""
    trials = {
        f"lower_mask/{backend}/{case.id}": partial(_one_plan, case, backend, device)
        for backend in backends(masks.SPEC, device)
        for case in cases
    }
    _report_each("lower_mask", trials, skip, report)


def masked(cases: list[Case]) -> list[Case]:
    """Those of attention's cases that have a mask, as cases of mask lowering."""
    made = [(case, case.make(Blank()).get("mask")) for case in cases]
    return [
        Case(f"attention/{case.id}", lambda m, mask=mask: {"mask": mask}) for case, mask in made if mask is not None
    ]


def _report_each(op: str, trials: dict[str, Trial], skip: Collection[str], report: Report) -> None:
    report({"plan": list(trials)})
    for name, trial in trials.items():
        if name not in skip:
            report({"begin": name})
            try:
                status, why = trial()
            except NO_MEMORY:
                status, why = "skipped", "the reference in float64 does not fit the memory it was given"
            except Exception as error:
                if context_is_lost(error):
                    raise
                status, why = "failed", f"{type(error).__name__}: {str(error)[:300]}"
            report({"stage": "proof", "op": op, "id": name, "status": status, "why": why})
            report({"end": name})


def _one(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype, device: str) -> tuple[str, str]:
    case = with_contents(drawn_there(case) if isinstance(case, Shape) else case)
    if why := refused(spec, backend, arguments(case, dtype, device)):
        return "skipped", why
    assert_outputs(spec, backend, case, dtype, device)
    if spec.differentiable and getattr(case, "gradients", True):
        try:
            assert_gradients(spec, backend, case, dtype, device)
        except NO_MEMORY:
            return "skipped", "the outputs are right; the gradients' reference does not fit the memory it was given"
    return "passed", ""


def _one_plan(case: Case, backend: str, device: str) -> tuple[str, str]:
    mask = case.make(Maker())["mask"]  # a mask is built on the host
    if why := refused(masks.SPEC, backend, {"mask": mask, "device": device}):
        return "skipped", why
    got, want = mask.plan(device, backend), mask.plan("cpu", "reference")
    assert (got.s_q, got.s_k) == (want.s_q, want.s_k), f"{got.s_q} x {got.s_k} tokens, want {want.s_q} x {want.s_k}"
    for place, (a, b) in enumerate(zip(got.arguments(), want.arguments(), strict=True)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = a.dtype == b.dtype and torch.equal(a.cpu(), b)
        else:
            same = type(a) is type(b) and a == b
        assert same, f"argument {place} of the plan differs"
    return "passed", ""


def capture_one(spec: OpSpec, backend: str, cases: Sequence[Case], device: str) -> tuple[str, str]:
    """The first case that `backend` serves, as a CUDA graph: replayed on other values it gives what a call gives."""
    dtype = torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]
    for case in cases:
        kwargs = arguments(with_contents(case), dtype, device)
        if refused(spec, backend, kwargs) is None:
            break
    else:
        return "skipped", "it serves none of the cases"
    call = without_gradients(Problem(spec.name, kwargs).ours(backend))
    replay = captured(call)
    other = Maker(dtype, device, seed=2)
    for x in kwargs.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.copy_(other.randn(*x.shape))
    got = [x.clone() for x in tensors_of(spec, replay())]
    for place, (a, b) in enumerate(zip(got, tensors_of(spec, call()), strict=True)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), (
            f"{case.id}: output {place} of the replay differs from a call's"
        )
    return "passed", ""


def context_is_lost(error: Exception) -> bool:
    """After these nothing runs in this process any more."""
    return any(sign in str(error) for sign in FATAL)
