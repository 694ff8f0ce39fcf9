"""Counters that are zero when a kernel starts and that it leaves at zero, so that no launch is spent on clearing them.

A kernel whose programs hand in parts counts them: the program that draws the last ticket joins the parts, and puts the
counter back. That is sound as long as no two kernels that may run at the same time count on the same counters:

- eager launches on one stream run one after the other and share that stream's counters;
- a launch captured into a CUDA graph gets counters of its own, because graphs may be replayed on any stream.
"""

from __future__ import annotations

import torch

from vkernels import library

SLAB = 1 << 18  # counters of a device that captured launches draw from
_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_slabs: dict[torch.device, list[torch.Tensor]] = {}


def counters(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` int32 zeros for one launch on the current stream of `device`."""
    if library.recording_for is not None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured(count, device)
        _slab(device)
        stream = torch.cuda.current_stream(device).cuda_stream
    else:
        stream = 0
    held = _by_stream.get((device, stream))
    if held is None or held.numel() < count:
        held = _zeros(max(1024, 1 << (count - 1).bit_length()), device)
        _slabs.setdefault(device, []).append(held)  # a kernel under way may still use the smaller one: never freed
        _by_stream[device, stream] = held
    return held


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    """Zeros that are there, made on a stream of their own: a pool that serves only the current stream (that of a graph
    being warmed up) must not own what outlives it."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
    side.synchronize()  # once per device and stream, like compiling
    return zeros


def _slab(device: torch.device) -> list[torch.Tensor]:
    if device not in _slabs:
        _slabs[device] = [_zeros(SLAB, device)]
    return _slabs[device]


def _captured(count: int, device: torch.device) -> torch.Tensor:
    """The next counters of the slab; past its end, or before there is one, zeros that every replay clears itself."""
    slab = _slabs.get(device)
    if slab is None or slab[0].numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    mine, slab[0] = slab[0][:count], slab[0][count:]
    return mine
