"""What a call is cut to on a backend: read off the kernels, whose launches are noted down and not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from vkernels import library
from vkernels.dispatch import Backend
from vkernels.triton.launch import recording


def tiles(op: str, backend: Backend, call: Any, chip: str) -> tuple[str, ...]:
    """A line for each kernel `backend` would run for the call on `chip`; nothing is computed, nothing is written."""
    if backend.name == "cpu":
        return _cpu(op)
    if backend.name not in ("cuda", "triton"):
        return ()

    def run() -> None:
        with torch.no_grad():
            backend.run(tree_map(_stand_in, call))

    with recording(chip) as launches:
        if backend.name == "cuda":
            return _cuda(run)
        run()
    return tuple(_triton(op, chip, launch) for launch in launches)


def _stand_in(x: Any) -> Any:
    """Memory of the same shape that nobody minds: a launcher may copy what it returns."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return x


def _cpu(op: str) -> tuple[str, ...]:
    c = library.native()
    sizes = ", ".join(f"{what} {size:,}" for what, size in c.tile_sizes(op).items())
    return (f"{c.isa_active()}: {sizes}",)


def _cuda(run: Callable[[], None]) -> tuple[str, ...]:
    if (missing := library.cuda_unbuilt()) is not None:
        return (missing,)
    return tuple(
        f"{kernel}: {x:,} x {y:,} blocks of {threads} threads, {shared:,} bytes of shared memory"
        for kernel, x, y, threads, shared in library.cuda_launches(run)
    )


def _triton(op: str, chip: str, launch: Any) -> str:
    from vkernels.triton.tiles import names

    held = {**launch.arguments, **launch.options}
    sizes = ", ".join(f"{name} {held[name]}" for name in names(op, launch.name, chip) if name in held)
    programs = " x ".join(f"{n:,}" for n in launch.grid)
    return f"{launch.name}: {sizes}{'; ' if sizes else ''}{programs} programs"
