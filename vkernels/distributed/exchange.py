"""Every byte that leaves a rank goes through here: public torch.distributed calls, counted.

While torch.compile traces, it puts functional collectives in the place of these calls, and nothing is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op, register_autograd, register_fake

from vkernels.check import NoBackend, ShapeError, refusal


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


def all_to_all(rows: Tensor, sizes: Sequence[int], counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Of rows (sum of sizes ...), the first sizes[0] go to rank 0, and so on; what comes from rank 0, counts[0] rows,
    from rank 1, ...: (sum of counts ...)."""
    received = rows.new_empty((sum(counts), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, list(counts), list(sizes), group)
    if not torch.compiler.is_compiling():
        _, me = size_and_rank(group)
        for r, size in enumerate(sizes):
            if r != me and size:
                _count(rows[:size].numel() * rows.element_size())
    return received


def all_gather(x: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """x (up to `rows` ...) of every rank: (world rows ...). Rows past those of a rank are zeros."""
    world, _ = size_and_rank(group)
    if x.shape[0] < rows:
        x = torch.cat([x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))])
    everyone = x.new_empty((world, *x.shape))
    dist.all_gather(list(everyone.unbind()), x, group)
    if not torch.compiler.is_compiling():
        for _ in range(world - 1):
            _count(x.numel() * x.element_size())
    return everyone


# ---- agreement


class Told(NamedTuple):
    """What a rank tells the others of its call: a fingerprint of its meaning, or that it ends in an exception."""

    digest: int = 0
    kind: str = ""
    sentence: str = ""


REFUSALS = {kind.__name__: kind for kind in (ShapeError, NoBackend, TypeError, ValueError, NotImplementedError)}


def refused(error: Exception) -> Told:
    return Told(0, type(error).__name__, str(error))


def fingerprint(*meaning: Any) -> Told:
    """Of what a call means on this rank, equal in every process, for `agree`."""
    return Told(int.from_bytes(hashlib.sha256(repr(meaning).encode()).digest()[:7], "big"))


def agree(op: str, told: Told, group: ProcessGroup, *xs: Tensor) -> Sequence[Tensor]:
    """`xs`, which nothing has been sent of, once every rank means the same call; else an exception on every rank.

    In a graph the exception is raised where the graph is run, not where it is made: there the ranks stand in the same
    place, whichever of them had to trace. What is sent of `xs` comes out of the operator that raises, so it is sent
    later; and the exchange is one of the graph's own collectives, which no rank puts in another order. A call that is
    refused has such a graph, too: `xs` then look like its results.
    """
    world, me = size_and_rank(group)
    if torch.compiler.is_compiling():
        mine = torch.ops.vkernels.told(xs[0], told.digest, told.kind != "", _number())
    else:
        mine = _told(xs[0], told.digest, told.kind != "", 0)
    everyone = mine.new_empty((world, 2))
    dist.all_gather(list(everyone.unbind()), mine, group)
    if torch.compiler.is_compiling():
        return torch.ops.vkernels.agreed(xs, everyone, op, me, told.kind, told.sentence)  # type: ignore[no-any-return]
    _judge(everyone, op, me, told.kind, told.sentence)
    return xs


_calls = count()


@torch.compiler.assume_constant_result
def _number() -> int:
    """Of a call in a graph: no two are alike, or the compiler could make them one on the ranks where they are."""
    return next(_calls)


def _told(x: Tensor, digest: int, refused: bool, number: int) -> Tensor:
    return torch.tensor([digest, refused], dtype=torch.int64, device=x.device)


def _judge(everyone: Tensor, op: str, me: int, kind: str, sentence: str) -> None:
    if kind:
        raise REFUSALS.get(kind, ValueError)(sentence)
    digests = everyone.tolist()
    refused = [r for r, (_, bad) in enumerate(digests) if bad]
    if refused:
        raise ValueError(refusal(op, "arguments", "be accepted by every rank", f"refusals on ranks {refused}"))
    others = [r for r, (digest, _) in enumerate(digests) if digest != digests[me][0]]
    if others:
        rule = "agree on every rank (mask, shapes, dtype, scale, scheme)"
        raise ValueError(refusal(op, "arguments", rule, f"others than rank {me}'s on ranks {others}"))


HIDDEN = (torch.Tag.cudagraph_unsafe,)  # what a graph cannot show: exceptions, exchanges of an operator's own

custom_op(
    "vkernels::told",
    _told,
    mutates_args=(),
    schema="(Tensor x, int digest, bool refused, int number) -> Tensor",
    tags=HIDDEN,
)
register_fake("vkernels::told", lambda x, *rest: x.new_empty(2, dtype=torch.int64))


@custom_op(
    "vkernels::agreed",
    mutates_args=(),
    schema="(Tensor[] xs, Tensor everyone, str op, int me, str kind, str sentence) -> Tensor[]",
    tags=HIDDEN,
)
def _agreed(xs: Sequence[Tensor], everyone: Tensor, op: str, me: int, kind: str, sentence: str) -> list[Tensor]:
    _judge(everyone, op, me, kind, sentence)
    return [x.clone(memory_format=torch.contiguous_format) for x in xs]


register_fake("vkernels::agreed", lambda xs, *rest: [x.new_empty(x.shape) for x in xs])
register_autograd("vkernels::agreed", lambda ctx, grads: (grads, None, None, None, None, None))
