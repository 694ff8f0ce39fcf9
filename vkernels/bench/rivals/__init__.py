"""What each op is raced against: what a user would otherwise write, and the best library that is importable.

A rival is one small function from a Problem to a call, its masks and compiled code prepared outside the timed part. It
gives None where it does not speak of such a call, and raises where it cannot run: the reason is printed.

    @rival("permute + contiguous", "rearrange")
    def permute(problem: Problem) -> Call | None: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from vkernels.bench.problem import Call, Problem

Prepare = Callable[[Problem], Call | None]
ROOMS = ("attention", "divided", "cache", "rotate", "moves", "definition")


class Cannot(Exception):
    """Why a rival cannot run, in a sentence."""


@dataclass(frozen=True)
class Rival:
    name: str
    ops: tuple[str, ...]
    prepare: Prepare
    compare: bool = True  # False where the outputs mean different things
    gpu: bool = False  # it has nothing for a CPU
    compiles: bool = False  # seconds before its first call


REGISTRY: dict[str, Rival] = {}


def rival(
    name: str, *ops: str, compare: bool = True, gpu: bool = False, compiles: bool = False
) -> Callable[[Prepare], Prepare]:
    def register(prepare: Prepare) -> Prepare:
        REGISTRY[name] = Rival(name, ops, prepare, compare, gpu, compiles)
        return prepare

    return register


def rivals_of(op: str) -> list[Rival]:
    for room in ROOMS:
        import_module(f"vkernels.bench.rivals.{room}")
    return [found for found in REGISTRY.values() if op in found.ops]


def needs(package: str, name: str) -> None:
    if find_spec(package) is None:
        raise Cannot(f"{name} is not installed")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # or it gives up compiling the same rival after a few cases
    return torch.compile(function, dynamic=False)


def reason(error: Exception) -> str:
    """Why it could not run, in one line."""
    said = str(error).strip().splitlines()
    first = said[0][:200] if said else ""
    return first if isinstance(error, Cannot) else f"{type(error).__name__}: {first}"
