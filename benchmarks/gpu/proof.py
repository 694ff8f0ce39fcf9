"""Every op on the GPU against float64: its spec's cases in every dtype, gradients too, then its real sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from benchmarks.gpu.cases import drawn_there, with_contents
from benchmarks.gpu.supervise import emit
from vkernels.spec import Case, OpSpec, Shape
from vkernels.testing.evidence import arguments, assert_gradients, assert_outputs

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


def prove(
    spec: OpSpec, cases: list[Case], device: str, skip: Collection[str] = (), report: Callable[[dict], None] = emit
) -> None:
    """One report per case, backend and dtype: {"op", "id", "status": "passed" | "failed" | "skipped", "why"}."""
    planned = [
        (f"{spec.name}/{backend}/{case.id}/{str(dtype).removeprefix('torch.')}", backend, case, dtype)
        for backend in backends(spec, device)
        for case in cases
        for dtype in (case.dtypes if isinstance(case, Shape) else spec.dtypes)
    ]
    report({"plan": [name for name, *_ in planned]})
    for name, backend, case, dtype in planned:
        if name not in skip:
            report({"begin": name})
            made = with_contents(drawn_there(case) if isinstance(case, Shape) else case)
            status, why = _one(spec, backend, made, dtype, device)
            report({"stage": "proof", "op": spec.name, "id": name, "status": status, "why": why})
            report({"end": name})


def _one(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype, device: str) -> tuple[str, str]:
    try:
        if why := refused(spec, backend, arguments(case, dtype, device)):
            return "skipped", why
        assert_outputs(spec, backend, case, dtype, device)
        if spec.differentiable and getattr(case, "gradients", True):
            assert_gradients(spec, backend, case, dtype, device)
    except NO_MEMORY:
        return "skipped", "the reference in float64 does not fit this GPU's memory"
    except Exception as error:
        if context_is_lost(error):
            raise
        return "failed", f"{type(error).__name__}: {str(error)[:300]}"
    return "passed", ""


def context_is_lost(error: Exception) -> bool:
    """After these nothing runs in this process any more."""
    return any(sign in str(error) for sign in FATAL)
