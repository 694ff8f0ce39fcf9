"""Tile tables: `tiles.json` beside the kernels says, per kernel, which limit it runs into, and per chip its tiles.

    {"_attention_fwd_kernel": {"bound": "arithmetic",
                               "candidates": {"BLOCK_M": [64, 128], "num_warps": [4, 8]},
                               "sm90": [{"d": 64, "bytes": 2, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4}, ...]}}

"bound" is what the machine code is held to: "arithmetic"; "bytes"; "reads", where next to nothing is written;
"latency", where a launch costs more than either. A name that goes on after a comma holds tiles for some calls of a
kernel.
The first row whose `d` (head size or row length) and `bytes` (of an element) are not below the call's is taken; a row
without one of them serves every value. A chip without rows of its own takes those of the nearest older one. Rows never
depend on sequence length. `python -m vkernels tune` measures the candidates and writes rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import vkernels
from vkernels.remember import forget

ROOT = Path(vkernels.__file__).parent
LIMITS = ("d", "bytes")
_override: dict[str, dict[str, int]] = {}
_asked: list[tuple[str, str, int, int]] | None = None


def home(op: str) -> Path:
    """The folder an op's kernels and their table live in."""
    return ROOT / "masks" if op == "lower_mask" else ROOT / "ops" / op


@cache
def table(op: str) -> dict[str, Any]:
    """The table of an op: kernel -> {"bound", "candidates", chip: rows}."""
    return json.loads((home(op) / "tiles.json").read_text())


def tiles(op: str, kernel: str, arch: str, *, d: int = 0, bytes: int = 0) -> dict[str, int]:
    """The meta-parameters of one launch, `num_warps` and `num_stages` included."""
    if _asked is not None:
        _asked.append((op, kernel, d, bytes))
    if kernel in _override:
        return _override[kernel]
    return _tiles(op, kernel, arch, d, bytes)


def rows_of(op: str, kernel: str, arch: str) -> list[dict[str, int]]:
    """The rows `tiles` chooses from on a chip."""
    return table(op)[kernel][_nearest(table(op)[kernel], arch)]


@cache
def _tiles(op: str, kernel: str, arch: str, d: int, bytes: int) -> dict[str, int]:
    return {name: value for name, value in row(op, kernel, arch, d, bytes).items() if name not in LIMITS}


def row(op: str, kernel: str, arch: str, d: int, bytes: int) -> dict[str, int]:
    """The row that serves a call, as it stands in the table."""
    need = {"d": d, "bytes": bytes}
    for row in rows_of(op, kernel, arch):
        if all(row.get(limit, need[limit]) >= need[limit] for limit in LIMITS):
            return row
    raise LookupError(f"tiles.json of {op}: no row of {kernel} on {arch} serves d={d}, {bytes} bytes")


def names(op: str, kernel: str, arch: str) -> list[str]:
    """What the rows of a kernel say on a chip, in their order."""
    rows = [row for name, of in table(op).items() if name.split(",")[0] == kernel for row in of[_nearest(of, arch)]]
    return list(dict.fromkeys(name for row in rows for name in row if name not in LIMITS))


def _nearest(kernel: dict[str, Any], arch: str) -> str:
    if arch in kernel or arch == "interpreter":
        return arch
    older = [a for a in kernel if a.startswith("sm") and int(a[2:]) <= int(arch[2:])]
    return max(older, key=lambda a: int(a[2:]))


@contextlib.contextmanager
def asking() -> Iterator[list[tuple[str, str, int, int]]]:
    """The (op, kernel, d, bytes) of every row that is asked for inside: what tuning has to find rows for."""
    global _asked
    before, _asked = _asked, []
    forget()
    try:
        yield _asked
    finally:
        _asked = before


@contextlib.contextmanager
def overridden(kernel: str, row: dict[str, int]) -> Iterator[None]:
    """`kernel` runs with `row` inside: how tuning tries a candidate."""
    _override[kernel] = row
    forget()
    try:
        yield
    finally:
        del _override[kernel]
        forget()
