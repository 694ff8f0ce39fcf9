"""Seams: the places of a model where something was replaced, how often each was used, and what was left as it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

MARK = "_vkernels_seams"  # in a module's __dict__: {kind: Seam}


@dataclass
class Seam:
    """One replacement, shared by all modules of a class: what was there, what is there now, and how often it ran."""

    kind: str  # attention, rope, patch, window, norm, pool, merge, block, divided, mask, cache
    where: str  # the class whose method or function it is
    stock: str  # what was there
    ours: str  # what is there now
    modules: int = 0
    calls: int = 0
    stock_calls: Counter[str] = field(default_factory=Counter)  # calls given back to the stock path, by reason

    def called(self) -> None:
        if not torch.compiler.is_compiling():
            self.calls += 1

    def left_to_stock(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self.stock_calls[reason] += 1

    def __str__(self) -> str:
        line = f"{self.kind}: {self.where} x {self.modules}: {self.stock} -> {self.ours}, {self.calls} calls"
        back = "; ".join(f"{count} on the stock path ({reason})" for reason, count in self.stock_calls.items())
        return f"{line}; {back}" if back else line


@dataclass(frozen=True)
class Left:
    """What was left as it was, and why."""

    kind: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.why}"


def seam_of(module: Any, kind: str) -> Seam | None:
    if torch.compiler.is_compiling():
        return None
    return module.__dict__.get(MARK, {}).get(kind)
