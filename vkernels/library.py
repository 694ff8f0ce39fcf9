"""The two doors to code outside Python: the native library `vkernels._C`, and torch's operator registry.

Import never compiles anything. Where `_C` was not built, `native_missing()` is the sentence that says so and every
other backend works.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vkernels.check import NoBackend, refusal

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


INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") not in (
    "0",
    "",
)  # Triton reads it once
_TRITON = find_spec("triton") is not None
recording_for: str | None = None  # the chip launches are noted down for, while they are (vkernels/triton/launch.py)


_capabilities: dict[torch.device, tuple[int, int]] = {}


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU; torch takes microseconds to say so."""
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


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


# The CUDA kernels compiled for the CPU, where the tests put them (docs/cuda-on-cpu.md); they run on CPU tensors.
emulator: Any = None


@torch.compiler.assume_constant_result
def cuda_missing() -> str | None:
    """None when the CUDA kernels are built in and a driver can run them, else the sentence that says why not."""
    return _missing or _C.cuda_missing()


def cuda_why_not(tensor: torch.Tensor) -> str | None:
    """The reasons every CUDA kernel shares for refusing a call on `tensor`."""
    if tensor.dtype == torch.float64:
        return "dtype float64 is served by the reference only"
    if tensor.device.type == "cpu" and (emulator is not None or recording_for is not None):
        return None
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, this backend runs on NVIDIA GPUs"
    if (missing := cuda_missing()) is not None:
        return missing
    major, minor = capability(tensor.device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, this backend needs sm_80 or newer"


# KiB of shared memory a block may have; other chips from sm_86 on give 99 (sm_86, sm_89, sm_120).
_SHARED_KIB = {"sm80": 163, "sm87": 163, "sm90": 227, "sm100": 227, "sm103": 227}


def shared_limit(chip: str) -> int:
    """Bytes of shared memory a block may have on a chip such as "sm80"."""
    return _SHARED_KIB.get(chip, 99) << 10


def shared_why_not(tensor: torch.Tensor, needed: int) -> str | None:
    """None where a block of `needed` bytes of shared memory runs on the GPU of `tensor`, else the sentence."""
    if tensor.device.type == "cuda":
        major, minor = capability(tensor.device)
        chip = f"sm{major}{minor}"
    else:
        chip = recording_for or "sm90"  # the emulator's
    if needed <= (limit := shared_limit(chip)):
        return None
    return f"a block takes {needed / 1024:.0f} KiB of shared memory, {chip} gives {limit >> 10}"


_noting = False


def cuda_unbuilt() -> str | None:
    """None when the CUDA kernels are built in, whether or not a GPU is here; else the sentence that says why not."""
    return None if emulator is not None or hasattr(_C, "cuda_launches") else cuda_missing()


def cuda_launches(call: Callable[[], Any]) -> list[tuple[str, int, int, int, int]]:
    """(kernel, blocks, rows of blocks, threads of a block, bytes of shared memory) of each launch that CUDA kernels
    called by `call` would make. Nothing is launched, so no GPU need be here; call it where `cuda_unbuilt()` is None."""
    global _noting
    _noting = True
    try:
        return (_C if emulator is None else emulator.module).cuda_launches(call)
    finally:
        _noting = False


def run_cuda(name: str, tensors: Sequence[torch.Tensor | None], *rest: Any) -> None:
    """Call the native CUDA function `name` with references to `tensors`, then `rest`, then device and stream.

    Device and stream are torch's at the time of the call. Nothing waits for the device, so a call can be captured into
    a CUDA graph.
    """
    op_name = name.removesuffix("_cuda")
    device = next(x.device for x in tensors if x is not None)
    for x in tensors:
        if x is not None and x.device != device:
            raise TypeError(refusal(op_name, "tensors", f"be on one device ({device})", x.device))
    references = [ref(x) for x in tensors]
    if _noting:
        getattr(emulator or _C, name)(*references, *rest, 0, 0)
        return
    if device.type != "cuda":
        if emulator is None:
            raise NoBackend(f"{op_name}: tensors must be on an NVIDIA GPU, got {device}")
        getattr(emulator, name)(*references, *rest, 0, 0)
        return
    if (missing := cuda_missing()) is not None:
        raise NoBackend(f"{op_name}: {missing}")
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        getattr(_C, name)(*references, *rest, device.index, stream)
    else:
        with torch.cuda.device(device):
            getattr(_C, name)(*references, *rest, device.index, stream)


def lazily(module: str, function: str) -> Callable[..., Any]:
    """`module.function`, imported when it is first called: Triton takes a second to import."""

    @cache
    def load() -> Callable[..., Any]:
        return getattr(import_module(module), function)

    def run(*args: Any) -> Any:
        return load()(*args)

    run.load = load  # type: ignore[attr-defined]
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


def whole_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or a copy where its rows do not all begin at 16-byte addresses: CUDA kernels that copy rows in
    vectors honour every stride that keeps to them."""
    lanes = 16 // tensor.element_size()
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    whole = tensor.data_ptr() % 16 == 0 and all(stride % lanes == 0 for size, stride in strides if size > 1)
    return unit_stride(tensor) if whole else tensor.clone(memory_format=torch.contiguous_format)


_registry = torch.library.Library("vkernels", "FRAGMENT")

# Triton's interpreter and the emulator of the CUDA kernels run on CPU tensors; `launch` and `run_cuda` refuse them
# where there is neither.
DISPATCH_KEYS = {"cpu": ("CPU",), "triton": ("CUDA", "CPU"), "cuda": ("CUDA", "CPU")}


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
        _direct[name, backend] = function
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


_direct: dict[tuple[str, str], Callable[..., Any]] = {}


def op(name: str, backend: str, doors: dict[str, Callable[..., Any]] | None = None) -> Any:
    """The registered overload `torch.ops.vkernels.<name>.<backend>`, called past the dispatcher where it would only
    pass the arguments on: that costs more than everything else the host does for a call (docs/benchmarking.md).

    `doors` are those of a remembered decision (vkernels/remember.py): what was found to run such calls is put there.
    """
    if torch.compiler.is_compiling():
        return _overload(name, backend)
    if doors is not None and (run := doors.get(name)) is not None and _nobody_listens():
        return run

    def call(*args: Any) -> Any:
        if not (_nobody_listens() and _plain(args, torch.is_grad_enabled())):
            return _overload(name, backend)(*args)
        run = _direct[name, backend]
        if doors is not None:
            run = run.load() if hasattr(run, "load") else run
            run = doors[name] = run.plan(*args) if hasattr(run, "plan") else run
        return run(*args)

    return call


def _overload(name: str, backend: str) -> Any:
    return getattr(getattr(torch.ops.vkernels, name), backend)


def _nobody_listens() -> bool:
    """No mode, transform, tracer, profiler or forward derivative is active that the dispatcher would serve."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
    )


def _plain(args: Any, grad: bool) -> bool:
    """Every tensor is nothing but memory: no subclass, no values elsewhere (meta, lazy negation), no gradient asked."""
    for x in args:
        kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if (grad and x.requires_grad) or x.is_meta or x.is_neg():
                return False
        elif x is None or kind is int or kind is float or kind is bool:
            continue
        elif kind is list or kind is tuple:
            if x and not isinstance(x[0], int) and not _plain(x, grad):
                return False
        elif isinstance(x, torch.Tensor):
            return False
    return True


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
