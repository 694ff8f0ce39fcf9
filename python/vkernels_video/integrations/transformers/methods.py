"""Methods of known classes that are replaced whole, by class name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vkernels_video.integrations.transformers.seams import Seam


@dataclass(frozen=True)
class Method:
    """`name(self, *parameters)` of a class: what replaces it, and for which instances it cannot."""

    kind: str
    name: str
    parameters: tuple[str, ...]
    ours: str
    make: Callable[[Any, Seam], Callable[..., Any]]
    why_not: Callable[[Any], str | None] = lambda module: None


METHODS: dict[str, tuple[Method, ...]] = {}
