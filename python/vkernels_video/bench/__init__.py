"""What vkernels_video brings to `python -m vkernels bench`, named as entry points in pyproject.toml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vkernels.bench.case import Bench
    from vkernels.bench.results import Stage


def integrations() -> list[Bench]:
    """transformers' own parts, as they are and as `apply` leaves them."""
    import transformers  # noqa: F401  its absence is the sentence

    from vkernels_video.bench.integrations import benches

    return benches()


def stages(match: str, seconds: float) -> Iterator[Stage | str]:
    """The reference model's stages."""
    from vkernels_video.bench import model

    return model.stages(match, seconds)
