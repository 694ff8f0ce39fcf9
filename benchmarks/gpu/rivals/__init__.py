"""What each op is raced against: what a user would otherwise write, and the best library that is importable.

A rival is built from the keyword arguments of our public function, its masks and compiled code prepared outside the
timed part. One that cannot run says why, and the sentence is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.cases import Race


@dataclass(frozen=True)
class Rival:
    name: str
    call: Callable[[], Any]
    compare: bool = True  # False where the outputs mean different things


def installed(package: str) -> bool:
    return find_spec(package) is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # or it gives up compiling the same rival after a few cases
    return torch.compile(function, dynamic=False)


def rivals(race: Race, kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Rival]]]:
    """(name, how to prepare it) of every rival of a case; preparing may fail, and the failure is the reason."""
    family = {
        "attention": "attention",
        "divided_attention": "divided",
        "decode_attention": "cache",
        "kv_append": "cache",
        "lower_mask": "attention",
        "apply_rope": "rotate",
        "qkv_prologue": "rotate",
        "rearrange": "moves",
    }.get(race.op, "generic")
    yield from import_module(f"benchmarks.gpu.rivals.{family}").rivals(race, kwargs)
