"""Grid: how the tokens of a video lie in time and space."""

from __future__ import annotations

from dataclasses import dataclass

from vkernels.check import require


@dataclass(frozen=True)
class Grid:
    """A video of `t` frames of `h` x `w` tokens, frame-major: (frame, row, col) is token (frame*h + row)*w + col."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        for axis in "thw":
            size = getattr(self, axis)
            whole = isinstance(size, int) and not isinstance(size, bool)
            require(whole, "Grid", axis, "be an int", repr(size), TypeError)
            require(size >= 0, "Grid", axis, "be at least 0", size)

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.t, self.h, self.w)
