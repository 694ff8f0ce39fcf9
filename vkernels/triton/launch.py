"""One door to every kernel: run it on the GPU or in Triton's interpreter, or note the launch down.

Noted launches (`recording`) are how everything that needs no GPU is checked without one: what a call would launch, for
which chip, and that launching depends on no value a tensor holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vkernels import library
from vkernels.check import NoBackend

INTERPRETED: bool = library.INTERPRETED


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name, and the options of its compilation."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


OPTIONS = ("num_warps", "num_stages", "maxnreg")
_launches: list[Launch] | None = None
_DISCARDED: list[Launch] = []  # stays empty


@contextlib.contextmanager
def recording(arch: str = "sm90") -> Iterator[list[Launch]]:
    """Launches inside are noted down, not run, as they would be on a chip of `arch`; outputs keep what they held."""
    global _launches
    before, _launches = (_launches, library.recording_for), []
    library.recording_for = arch
    try:
        yield _launches
    finally:
        _launches, library.recording_for = before


@contextlib.contextmanager
def discarding(arch: str = "sm90") -> Iterator[None]:
    """Launches inside go nowhere: what is left of a call is the host's own work."""
    global _launches
    before, _launches = (_launches, library.recording_for), _DISCARDED
    library.recording_for = arch
    try:
        yield
    finally:
        _launches, library.recording_for = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)` on the device of the first tensor; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _launches is not None:
        if _launches is _DISCARDED:
            return
        options = {name: meta.pop(name) for name in OPTIONS if name in meta}
        names = [name for name in kernel.arg_names if name not in meta]
        _launches.append(Launch(kernel, grid, dict(zip(names, args, strict=False)) | meta, options))
        return
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    if device.type == "cuda":
        if device.index == torch.cuda.current_device():
            kernel[grid](*args, **meta)
        else:
            with torch.cuda.device(device):
                kernel[grid](*args, **meta)
    elif INTERPRETED:
        kernel[grid](*args, **meta)
    else:
        raise NoBackend(f"{kernel.fn.__name__}: tensors must be on an NVIDIA GPU, got {device}")


def arch(device: torch.device) -> str:
    """Whose tiles to use: sm80, sm90, ..., or interpreter."""
    if library.recording_for is not None:
        return library.recording_for
    if INTERPRETED:
        return "interpreter"
    major, minor = library.capability(device)
    return f"sm{major}{minor}"


def alignment(strides: Iterable[int]) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride.

    Triton only notices multiples of 16. Strides passed as multiples of a constant let it see that rows of 72 elements
    start at 16-byte addresses, too.
    """
    return math.gcd(8, *strides)


def blueprint(x: torch.Tensor) -> torch.Tensor:
    """What a new tensor like `x` will look like, without its memory: for plans of launches."""
    return torch.empty_like(x, memory_format=torch.contiguous_format, device="meta")


def cdiv(n: int, size: int) -> int:
    """Tiles of `size` that cover `n`. Triton's own takes microseconds on the host, as its next_power_of_2 does."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()
