"""Memory that tells: NaN where nothing was written, sentinels where nothing may be written, strides nobody expects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 64  # elements before and after every allocation
SENTINEL = 77.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty*` inside holds NaN (integers: the largest value), so reading what nobody wrote shows."""
    switch: Any = torch.utils.deterministic
    was, warn, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        switch.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
        switch.fill_uninitialized_memory = fill


class guarded_memory(TorchDispatchMode):
    """Every allocation inside sits between sentinels; leaving the block raises if one was overwritten."""

    ALLOCATORS = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in self.ALLOCATORS or result.device.type == "meta" or result.layout != torch.strided:
            return result
        span = 1 + sum((size - 1) * stride for size, stride in zip(result.shape, result.stride(), strict=True))
        span = span if result.numel() else 0
        block = torch.full((span + 2 * GUARD,), SENTINEL, device=result.device).to(result.dtype)
        self.guards += [block[:GUARD], block[GUARD + span :]]
        return block.as_strided(result.shape, result.stride(), GUARD)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if exception[0] is None:
            for guard in self.guards:
                expected = torch.full_like(guard, SENTINEL)
                assert torch.equal(guard, expected), "a kernel wrote outside its output"


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view with strides no kernel can take for granted: the two dimensions before the last swapped
    in memory, every row inside a longer one that holds NaN (0 for integers), its start not aligned."""
    swap = tensor.dim() >= 3
    source = tensor.transpose(-3, -2) if swap else tensor
    fill = float("nan") if tensor.is_floating_point() else 0
    if tensor.dim() == 0:
        return tensor.clone()
    holder = torch.full([*source.shape[:-1], source.shape[-1] + 3], fill, dtype=tensor.dtype, device=tensor.device)
    view = holder[..., 1:-2].copy_(source)
    return view.transpose(-3, -2) if swap else view
