"""Every byte that leaves a rank goes through here: public torch.distributed calls, counted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vkernels.check import refusal


@dataclass
class Traffic:
    """What this rank sent to others."""

    bytes: int = 0
    messages: int = 0


_counters: list[Traffic] = []


@contextmanager
def traffic() -> Any:
    """Count what is sent inside: ``with traffic() as sent: ...; sent.bytes``."""
    counter = Traffic()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(size: int) -> None:
    for counter in _counters:
        counter.bytes += size
        counter.messages += size > 0


def group_of(mesh: Any, op: str) -> ProcessGroup:
    """The process group of a one-dimensional DeviceMesh, a group itself, or the default group for None."""
    if not dist.is_available() or not dist.is_initialized():
        rule = "have been set up (torch.distributed.init_process_group, or torchrun)"
        raise RuntimeError(refusal(op, "the process group", rule, "none"))
    if mesh is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(mesh, ProcessGroup):
        return mesh
    if getattr(mesh, "ndim", None) != 1:
        rule = "be a one-dimensional DeviceMesh (mesh['name'] takes one of several), a ProcessGroup or None"
        raise ValueError(refusal(op, "mesh", rule, mesh))
    return mesh.get_group()


def size_and_rank(group: ProcessGroup) -> tuple[int, int]:
    return dist.get_world_size(group), dist.get_rank(group)


class Transfer:
    """Rows on their way between pairs of ranks; `wait` before they are read."""

    def __init__(
        self, group: ProcessGroup, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
    ):
        steps = []
        self._kept = [x for x, _ in sends]  # alive until they are gone
        for call, pairs in ((dist.isend, sends), (dist.irecv, receives)):
            for x, peer in pairs:
                if x.numel():
                    steps.append(dist.P2POp(call, x, dist.get_global_rank(group, peer), group, tag))
                    if call is dist.isend:
                        _count(x.numel() * x.element_size())
        self._works = dist.batch_isend_irecv(steps) if steps else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._kept = []


def all_to_all(parts: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """parts[r] (rows_r ...) goes to rank r; what comes from each rank, (counts[r] ...)."""
    _, me = size_and_rank(group)
    sizes = [len(part) for part in parts]
    sent = torch.cat(list(parts))
    received = sent.new_empty((sum(counts), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, list(counts), sizes, group)
    row = sent[:1].numel() * sent.element_size() if len(sent) else 0
    for r, size in enumerate(sizes):
        if r != me:
            _count(size * row)
    return list(received.split(list(counts)))


def all_gather(x: Tensor, counts: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """x (counts[me] ...) of every rank."""
    world, me = size_and_rank(group)
    longest = max(counts, default=0)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: len(x)] = x
    everyone = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everyone, padded, group)
    for r in range(world):
        if r != me:
            _count(padded.numel() * padded.element_size())
    return [rows[:count] for rows, count in zip(everyone, counts, strict=True)]


def fingerprint(*meaning: Any) -> int:
    """Of what a call means on this rank, equal in every process, for `agree`."""
    return int.from_bytes(hashlib.sha256(repr(meaning).encode()).digest()[:7], "big")


def agree(op: str, digest: int, problem: Exception | None, group: ProcessGroup, device: torch.device) -> None:
    """Raise on every rank where one has a problem, or where they do not mean the same call. Before anything is sent."""
    world, me = size_and_rank(group)
    mine = torch.tensor([digest, problem is not None], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine, group)
    if problem is not None:
        raise problem
    digests = torch.stack(everyone).tolist()
    refused = [r for r, (_, bad) in enumerate(digests) if bad]
    if refused:
        raise ValueError(refusal(op, "arguments", "be accepted by every rank", f"refusals on ranks {refused}"))
    others = [r for r, (other, _) in enumerate(digests) if other != digests[me][0]]
    if others:
        rule = "agree on every rank (mask, shapes, dtype, scale, scheme)"
        raise ValueError(refusal(op, "arguments", rule, f"others than rank {me}'s on ranks {others}"))
