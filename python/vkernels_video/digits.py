"""Short films of real handwritten digits, with questions that need time to be answered.

scikit-learn's 1,797 digits of 8 x 8 pixels, on a board of 3 x 3 places. A question's answer is one character. Training
and test films share no image of a digit.

A question's last byte says which question it is. A decoder of bytes without a word of pretraining otherwise has to
discover words and time at once: with a question mark behind "part 3" nothing was learnt in the 1,500 steps tried,
without it the question is answered after 200.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

BOARD, CELL = 3, 8
IMAGE = BOARD * CELL


@dataclass(frozen=True)
class Film:
    """Frames [t 3 h w] of pixels in -1..1, a question, and its answer."""

    frames: Tensor
    question: str
    answer: str
    kind: str


@cache
def _images(split: str) -> dict[int, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = np.arange(len(found.target)) % 5 == 0
    chosen = chosen if split == "test" else ~chosen
    return {digit: found.images[chosen & (found.target == digit)] / 8.0 - 1.0 for digit in range(10)}


class Studio:
    """Films from a seed: the same seed, split and length give the same films on every machine.

    frames: that are shown; `every`: how many were shot for each of them
    """

    def __init__(
        self, seed: int, split: str = "train", frames: int = 8, kinds: Sequence[str] | None = None, every: int = 1
    ):
        self.kinds = tuple(QUESTIONS if kinds is None else kinds)
        for kind in self.kinds:
            _known(kind)
        if split not in ("train", "test"):
            raise ValueError(f"Studio: split must be train or test, got {split!r}")
        if frames < 4:
            raise ValueError(f"Studio: frames must be at least 4, got {frames}")
        self.random, self.images, self.t = random.Random(f"{split} {seed}"), _images(split), frames * every
        self.every = every

    def film(self, kind: str | None = None) -> Film:
        """One film, of a kind or of any of the studio's."""
        kind = kind or self.random.choice(self.kinds)
        _known(kind)
        board = np.full((self.t, IMAGE, IMAGE), -1.0, dtype=np.float32)
        question, answer = KINDS[kind](self, board)
        shown = board[:: self.every]
        return Film(torch.from_numpy(shown)[:, None].expand(-1, 3, -1, -1), question, answer, kind)

    def digits(self, count: int) -> list[int]:
        return self.random.sample(range(10), count)

    def place(self, board: np.ndarray, digit: int, path: Callable[[int], tuple[int, int] | None]) -> None:
        """One image of `digit` where `path(frame)` says: (row, column) of the board, or None."""
        image = self.random.choice(self.images[digit])
        for frame in range(self.t):
            if (at := path(frame)) is not None:
                row, column = at[0] * CELL, at[1] * CELL
                board[frame, row : row + CELL, column : column + CELL] = image

    @staticmethod
    def _stay(cell: int, start: int, end: int) -> Callable[[int], tuple[int, int] | None]:
        at = divmod(cell, BOARD)
        return lambda frame: at if start <= frame < end else None

    def _moves(self, board: np.ndarray) -> tuple[str, str]:
        """Two digits pass each other in two columns."""
        up, down = self.digits(2)
        columns = self.random.sample(range(BOARD), 2)

        def row(frame: int) -> int:  # as long in the last row as in the first: the mean of the frames has no direction
            return int((frame + 0.5) * BOARD / self.t)

        self.place(board, up, lambda f: (BOARD - 1 - row(f), columns[0]))
        self.place(board, down, lambda f: (row(f), columns[1]))
        way = self.random.choice(["up", "down"])
        return f"which digit goes {way}", str(up if way == "up" else down)

    def _first(self, board: np.ndarray) -> tuple[str, str]:
        """Two or three digits appear one after the other, each for half of the film."""
        digits = self.digits(self.random.choice([2, 3]))
        cells = self.random.sample(range(BOARD * BOARD), len(digits))
        half = self.t // 2  # equally long: the mean of the frames does not say which came first
        times = sorted(self.random.sample(range(self.t - half + 1), len(digits)))
        for digit, cell, start in zip(digits, cells, times, strict=True):
            self.place(board, digit, self._stay(cell, start, start + half))
        end = self.random.choice(["early", "late"])
        return f"which digit came {end}", str(digits[0 if end == "early" else -1])

    def _count(self, board: np.ndarray) -> tuple[str, str]:
        """One to five digits, each for a part of the time."""
        digits = self.digits(self.random.randint(1, 5))
        cells = self.random.sample(range(BOARD * BOARD), len(digits))
        for digit, cell in zip(digits, cells, strict=True):
            start = self.random.randrange(self.t - 1)
            end = self.random.randint(start + 2, self.t)
            self.place(board, digit, self._stay(cell, start, end))
        return "how many digits", str(len(digits))

    def _when(self, board: np.ndarray) -> tuple[str, str]:
        """Another digit in every quarter of the film, always at the same place."""
        digits = self.digits(4)
        cell = self.random.randrange(BOARD * BOARD)
        for quarter, digit in enumerate(digits):
            start, end = (math.ceil(self.t * q / 4) for q in (quarter, quarter + 1))
            self.place(board, digit, self._stay(cell, start, end))
        asked = self.random.randrange(4)
        return f"which digit in part {asked + 1}", str(digits[asked])

    def _flash(self, board: np.ndarray) -> tuple[str, str]:
        """One digit for 1/32 to 1/8 of the film, at least a frame, and two that stay."""
        digits = self.digits(3)
        cells = self.random.sample(range(BOARD * BOARD), 3)
        for digit, cell in zip(digits[1:], cells[1:], strict=True):
            self.place(board, digit, self._stay(cell, 0, self.t))
        length = self.random.randint(max(self.t // 32, 1), max(self.t // 8, 1))
        start = self.random.randint(0, self.t - length)
        self.place(board, digits[0], self._stay(cells[0], start, start + length))
        return "which digit flashed", str(digits[0])


KINDS: dict[str, Callable[[Studio, np.ndarray], tuple[str, str]]] = {
    "moves": Studio._moves,
    "first": Studio._first,
    "count": Studio._count,
    "when": Studio._when,
    "flash": Studio._flash,
}
QUESTIONS = ("moves", "first", "count", "when")


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"Studio: kind must be one of {', '.join(KINDS)}, got {kind!r}")


def pictures(seed: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Boards [count 3 h w] of one to five digits, and what is in every place: [count places], 10 where it is empty."""
    chance, images, places = random.Random(f"pictures {split} {seed}"), _images(split), BOARD * BOARD
    boards = np.full((count, IMAGE, IMAGE), -1.0, dtype=np.float32)
    labels = np.full((count, places), 10)
    for board, label in zip(boards, labels, strict=True):
        for cell in chance.sample(range(places), chance.randint(1, 5)):
            label[cell] = digit = chance.randrange(10)
            row, column = (CELL * at for at in divmod(cell, BOARD))
            board[row : row + CELL, column : column + CELL] = chance.choice(images[digit])
    return torch.from_numpy(boards)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels)


def batch(studio: Studio, size: int) -> tuple[Tensor, list[Film]]:
    """Pixels [b t 3 h w] and the films."""
    films = [studio.film() for _ in range(size)]
    return torch.stack([film.frames for film in films]), films
