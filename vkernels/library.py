"""The two doors to code outside Python: the native library `vkernels._C`, and torch's operator registry.

Import never compiles anything. Where `_C` was not built, `native_missing()` is the sentence that says so and every
other backend works.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

try:
    from vkernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None
    _missing: str | None = (
        f"the native library vkernels._C cannot be loaded ({error}); run `pip install .` with a C++ compiler"
    )
else:
    _missing = None

DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.uint8: 5,
    torch.int8: 6,
    torch.float64: 7,
    torch.bool: 8,
}


def native_missing() -> str | None:
    """None when the native library is loaded, else the sentence that says why it is not."""
    return _missing


def native() -> Any:
    """The module vkernels._C; call it only where `native_missing()` is None."""
    return _C


def cpu_why_not(tensor: torch.Tensor) -> str | None:
    """The reasons every native CPU kernel shares for refusing a call on `tensor`."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, this backend runs on the CPU"
    if tensor.dtype == torch.float64:
        return "dtype float64 is served by the reference only"
    return _missing


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")  # Triton reads it once, when it is imported
_TRITON = find_spec("triton") is not None
recording_for: str | None = None  # the chip launches are noted down for, while they are (vkernels/triton/launch.py)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU."""
    return torch.cuda.get_device_capability(device)


def triton_why_not(tensor: torch.Tensor) -> str | None:
    """The reasons every Triton kernel shares for refusing a call on `tensor`."""
    if not _TRITON:
        return "Triton is not installed (pip install triton)"
    if tensor.dtype == torch.float64:
        return "dtype float64 is served by the reference only"
    if tensor.device.type == "cuda":
        major, minor = capability(tensor.device)
        return None if major >= 8 else f"the GPU is sm_{major}{minor}, this backend needs sm_80 or newer"
    if tensor.device.type == "cpu" and (INTERPRETED or recording_for is not None):
        return None
    return f"the tensors are on {tensor.device}, this backend runs on NVIDIA GPUs"


def lazily(module: str, function: str) -> Callable[..., Any]:
    """`module.function`, imported when it is first called: Triton takes a second to import."""

    def run(*args: Any) -> Any:
        return getattr(import_module(module), function)(*args)

    return run


def ref(tensor: torch.Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...], torch.Tensor] | None:
    """What a native function receives of a tensor: address, dtype code, sizes, strides; and the tensor itself, so that
    a temporary lives as long as its address is in use."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODE[tensor.dtype], tuple(tensor.shape), tensor.stride(), tensor


HUGE_PAGES_FROM = 8 << 20  # bytes


def fresh(tensors: Any) -> Any:
    """A tensor, or a tuple of them, just allocated to be written whole: large ones ask for huge pages first.

    New memory is mapped page by page as it is first written, which for outputs of tens of megabytes costs more than
    writing them: a copy of 134 MB took 42 ms with small pages and 13 ms with huge ones.
    """
    for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
        if tensor.nbytes >= HUGE_PAGES_FROM:
            _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensors


def lasting(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor` in a form autograd may keep: plans are built once and may have been built in inference mode."""
    return tensor if tensor is None or not tensor.is_inference() else tensor.clone()


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or a copy where its last dimension is strided (an expanded gradient, say): native kernels read
    rows, and honour every other stride as it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


_registry = torch.library.Library("vkernels", "FRAGMENT")

# Triton's interpreter runs on CPU tensors; on the GPU `launch` is the one that refuses them.
DISPATCH_KEYS = {"cpu": ("CPU",), "triton": ("CUDA", "CPU"), "cuda": ("CUDA",)}


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backends: dict[str, Callable[..., Any]],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Define `torch.ops.vkernels.<name>.<backend>` for every backend: one schema, one fake, one backward.

    The overload name is the backend, so a graph shows which kernel ran. `backward(ctx, *grads)` finds the overload that
    ran as `ctx.backend` when `setup_context` stores it; `setup_context(ctx, inputs, output)` receives it bound.
    """
    for backend, function in backends.items():
        overload = f"{name}.{backend}"
        _registry.define(f"{overload}{schema}")
        for key in DISPATCH_KEYS[backend]:
            _registry.impl(overload, function, key)
        torch.library.register_fake(f"vkernels::{overload}", fake, lib=_registry)
        if backward is not None:
            torch.library.register_autograd(
                f"vkernels::{overload}",
                _bound_backward(backward, backend),
                setup_context=setup_context,
                lib=_registry,
            )


def _bound_backward(backward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def run(ctx: Any, *grads: Any) -> Any:
        ctx.backend = backend
        return backward(ctx, *grads)

    return run


def op(name: str, backend: str) -> Any:
    """The registered overload `torch.ops.vkernels.<name>.<backend>`."""
    return getattr(getattr(torch.ops.vkernels, name), backend)


def _share_torch_threads() -> None:
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(torch_cpu) if torch_cpu.exists() else None)
    address = [
        ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
        for symbol in ("torch_parallel_for", "torch_get_num_threads")
    ]
    _C.set_torch_threads(*address)


if _C is not None:
    _share_torch_threads()
