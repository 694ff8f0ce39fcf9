"""What can be measured: a case of one of our ops, or a whole call somebody brings along; and either one built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten

from vkernels.bench.check import TOLERANCE, Truth, memory_left, relative_error, with_gradients
from vkernels.bench.problem import Call, Problem, backward_cost, problem_of, without_gradients
from vkernels.bench.rivals import Cannot, Prepare, Rival, rivals_of
from vkernels.dispatch import choose
from vkernels.roofline import Ceiling
from vkernels.spec import Blank, Cost, Maker

FORWARD, BOTH = "forward", "forward + backward"
LONGEST_S = 0.1  # a forward that takes longer than this at best is not waited for


LARGEST = 512 << 20  # bytes of arguments that a CPU is not asked to check in float64


@dataclass(frozen=True)
class Case:
    """A call of one of our ops. `make` gives the keyword arguments of its public function."""

    op: str
    id: str  # what is computed, as a reader would say it
    make: Callable[[Maker], dict[str, Any]]
    model: str = ""  # whose shape it is
    frames: int | None = None
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    backward: bool = False  # a run of everything also measures its gradients
    visible: Callable[..., Any] | None = None  # FlexAttention's predicate (b, h, q, k), where the mask has none
    rivals: Mapping[str, Prepare] = field(default_factory=dict)  # beside those every call of the op has
    always: bool = False  # also where it takes long
    targets: Mapping[tuple[str, torch.dtype], float] = field(
        default_factory=dict
    )  # (beginning of rivals' names, dtype)
    quick: Mapping[torch.dtype, str] = field(default_factory=dict)  # in the quick selection: dtype -> rival


@dataclass(frozen=True)
class Bench:
    """A call that is no op of ours: two sides somebody wrote. Calls build what they need when first called."""

    id: str
    op: str
    dtype: torch.dtype
    ours: Call
    rivals: dict[str, Call]
    cost: Cost
    targets: dict[str, float] = field(default_factory=dict)  # rival -> ratio to reach
    model: str = ""
    tolerance: float = 2e-2  # largest |ours - rival| relative to the largest |rival|
    compare: bool = True  # False only where the two outputs mean different things
    frames: int | None = None


@dataclass(frozen=True)
class Opponent:
    call: Call
    error: float | None  # against float64


class Built(Protocol):
    """A case with its inputs made, found correct."""

    @property
    def ours(self) -> Call: ...

    @property
    def backend(self) -> str: ...

    @property
    def error(self) -> float | None:
        """Against float64, where the call has a definition there."""

    def opponent(self, name: str) -> Opponent | None:
        """None where the rival does not speak of this call; raises where it cannot run."""


class Entry(Protocol):
    """One thing to measure, described; nothing of it is built."""

    @property
    def id(self) -> str: ...

    @property
    def op(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def frames(self) -> int | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def direction(self) -> str: ...

    @property
    def rivals(self) -> list[Rival]: ...

    @property
    def cost(self) -> Cost: ...

    def target(self, rival: str) -> float | None: ...

    def too_much(self, ceiling: Ceiling) -> str | None:
        """Why it is not measured on this device."""

    def build(self) -> Built:
        """Raises AssertionError, in a sentence, where our result is wrong."""


@dataclass(frozen=True)
class OpEntry:
    case: Case
    dtype: torch.dtype
    direction: str = FORWARD
    device: str = "cpu"

    @property
    def id(self) -> str:
        return self.case.id

    @property
    def op(self) -> str:
        return self.case.op

    @property
    def model(self) -> str:
        return self.case.model

    @property
    def frames(self) -> int | None:
        return self.case.frames

    @property
    def rivals(self) -> list[Rival]:
        own = [Rival(name, (self.op,), prepare) for name, prepare in self.case.rivals.items()]
        known = [r for r in rivals_of(self.op) if self.direction == FORWARD or r.compare]
        return own + [
            r for r in known if not own or not r.name.startswith("definition")
        ]  # it brings what one would write

    @cached_property
    def _size(self) -> tuple[Cost, int]:
        """What the forward must do, and the bytes its arguments hold."""
        problem = Problem(self.op, self.case.make(Blank(self.dtype)), self.case.visible)
        held = [x for x in tree_flatten(problem.kwargs)[0] if isinstance(x, torch.Tensor)]
        return problem.cost(), sum(x.nbytes for x in held)

    @property
    def cost(self) -> Cost:
        forward = self._size[0]
        if self.direction == FORWARD:
            return forward
        back = backward_cost(self.op, forward)
        return Cost(forward.flop + back.flop, forward.bytes + back.bytes)

    def target(self, rival: str) -> float | None:
        if self.direction != FORWARD:
            return None
        whole = {known.name for known in self.rivals}  # a name of one rival means that one, and no longer name

        def meant(name: str) -> bool:
            return rival == name or (name not in whole and rival.startswith(name))

        return next((v for (name, dtype), v in self.case.targets.items() if dtype == self.dtype and meant(name)), None)

    def too_much(self, ceiling: Ceiling) -> str | None:
        best = ceiling.time_s(self.cost.flop, self.cost.bytes, self.dtype)
        if best > LONGEST_S * (1 if self.direction == FORWARD else 3) and not self.case.always:
            return f"a call takes {best:.2g} s at the best"
        held = self._size[1]
        if held > LARGEST and self.device == "cpu" and not self.case.always:
            return f"its arguments are {held / 1e6:,.0f} MB, a GPU's size"
        wide = held * (1 + 2 * 8 / self.dtype.itemsize)  # beside it the same in float64, and what that becomes
        left = memory_left(self.device)
        return f"it needs about {wide / 1e9:.0f} GB and {left / 1e9:.0f} are free" if wide > left / 2 else None

    def build(self) -> OpBuilt:
        return OpBuilt(self)

    def made(self, dtype: torch.dtype) -> Problem:
        return problem_of(self.op, self.case.make, dtype, self.device, self.case.visible)


class OpBuilt:
    def __init__(self, entry: OpEntry):
        self.entry = entry
        problem = entry.made(entry.dtype)
        self.backend = _chosen(problem)
        self.leaves = problem.leaves() if entry.direction != FORWARD else []
        self.ours = self._directed(problem.ours())
        self.truth = self._truth(problem)
        result = self.ours()
        self.error = None if self.truth is None else self.truth.error(result)
        if self.truth is not None and self.error is not None:
            allowed = 0.0 if self.truth.exact else TOLERANCE[entry.dtype]
            assert self.error <= allowed, f"our result differs from float64 by {self.error:.1e} of the largest value"
        appends = "cache" in problem.kwargs and entry.op != "decode_attention"
        self.written = bool(problem.kwargs.get("inplace")) or appends  # our input is not what it was
        self.problem = problem

    def _directed(self, call: Call) -> Call:
        return with_gradients(call, self.leaves) if self.leaves else without_gradients(call)

    def _truth(self, problem: Problem) -> Truth | None:
        """None where there is no definition to be had: rivals are then what ours is compared with."""
        try:
            return Truth(problem, bool(self.leaves), self.entry.device, self.entry.made)
        except MemoryError:
            return None

    def opponent(self, name: str) -> Opponent | None:
        rival = next(r for r in self.entry.rivals if r.name == name)
        if rival.gpu and torch.device(self.entry.device).type != "cuda":
            raise Cannot("it needs a CUDA GPU")
        call = rival.prepare(self.entry.made(self.entry.dtype) if self.written else self.problem)
        if call is None:
            return None
        theirs = self._directed(call)
        result = theirs()
        if not rival.compare:
            return Opponent(theirs, None)
        if self.truth is not None and not self.truth.exact:
            error = self.truth.error(result)
            if not error <= TOLERANCE[self.entry.dtype]:
                raise ArithmeticError(f"it differs from float64 by {error:.1e} of the largest value")
            return Opponent(theirs, error)
        ours = self.ours()
        difference = relative_error(list(ours)[: len(result)] if isinstance(result, tuple) else ours, result)
        assert difference <= TOLERANCE[self.entry.dtype], f"our result differs from {name} by {difference:.1e}"
        return Opponent(theirs, None)


def _chosen(problem: Problem) -> str:
    spec = problem.spec
    if spec is None:
        return "torch"
    return choose(spec.name, spec.backends, None, spec.prepare(**problem.kwargs)).name


class CallEntry:
    """A Bench as an entry."""

    direction = FORWARD

    def __init__(self, bench: Bench):
        self.bench = bench
        self.id, self.op, self.model, self.frames = bench.id, bench.op, bench.model, bench.frames
        self.dtype, self.cost = bench.dtype, bench.cost

    @property
    def rivals(self) -> list[Rival]:
        return [Rival(name, (self.op,), lambda _: None) for name in self.bench.rivals]

    def target(self, rival: str) -> float | None:
        return self.bench.targets.get(rival)

    def too_much(self, ceiling: Ceiling) -> str | None:
        return None

    def build(self) -> CallBuilt:
        return CallBuilt(self.bench)


class CallBuilt:
    backend = ""
    error: float | None = None

    def __init__(self, bench: Bench):
        self.bench, self.ours = bench, bench.ours

    def opponent(self, name: str) -> Opponent:
        call = self.bench.rivals[name]
        ours, theirs = self.ours(), call()  # also builds what they build when first called
        if self.bench.compare:
            error = relative_error(ours, theirs)
            assert error <= self.bench.tolerance, f"our result differs from {name} by {error:.1e} of the largest value"
        return Opponent(call, None)
