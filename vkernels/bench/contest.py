"""One of our calls beside one rival, named: what the gate and the growth curves are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vkernels.bench.problem import Call, Problem, name_of, problem_of, without_gradients
from vkernels.bench.rivals import Rival, rivals_of
from vkernels.spec import Maker


@dataclass(frozen=True)
class Contest:
    """`make` gives the keyword arguments of our op; `rival` is the name of one of its rivals."""

    op: str
    id: str
    dtype: torch.dtype
    make: Callable[[Maker], dict[str, Any]]
    rival: str
    visible: Callable[..., Any] | None = None  # what create_block_mask is asked, of lower_mask

    @property
    def name(self) -> str:
        return f"{self.op}: {self.id} [{name_of(self.dtype)}]"

    def problem(self) -> Problem:
        return problem_of(self.op, self.make, self.dtype, visible=self.visible)

    def opponent(self) -> Rival:
        return next(rival for rival in rivals_of(self.op) if rival.name == self.rival)


def ours(problem: Problem) -> Call:
    return without_gradients(problem.ours())


def theirs(rival: Rival, problem: Problem) -> Call:
    """Raises where the rival cannot run this call."""
    call = rival.prepare(problem)
    assert call is not None, f"{rival.name} does not speak of this call of {problem.op}"
    return without_gradients(call)
