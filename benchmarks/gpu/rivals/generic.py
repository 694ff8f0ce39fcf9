"""Any op: its definition in plain PyTorch, eager and compiled. It computes in float32 inside, as the op does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from benchmarks.gpu import rivals as room
from benchmarks.gpu.cases import Race


def rivals(race: Race, kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], room.Rival]]]:
    spec = import_module(f"vkernels.ops.{race.op}.spec").SPEC

    def definition() -> Any:
        return spec.fn(**kwargs, backend="reference")

    yield "definition, eager", lambda: room.Rival("definition, eager", definition)
    yield "definition, compiled", lambda: room.Rival("definition, compiled", room.compiled(definition))
