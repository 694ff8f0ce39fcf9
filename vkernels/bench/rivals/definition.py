"""The definition in plain PyTorch, eager and compiled, for what no model writes in another way. It computes in float32
inside, as the op does."""

from __future__ import annotations

from vkernels.bench import rivals as room
from vkernels.bench.problem import Call, Problem
from vkernels.bench.rivals import moves, rotate


def _speaks(problem: Problem) -> bool:
    if problem.op == "rearrange":
        return moves.chain(problem) is None
    return rotate.chain(problem) is None


@room.rival("definition, eager", "apply_rope", "qkv_prologue", "rearrange")
def eager(problem: Problem) -> Call | None:
    return problem.ours("reference") if _speaks(problem) else None


@room.rival("definition, compiled", "apply_rope", "qkv_prologue", "rearrange", compiles=True)
def fast(problem: Problem) -> Call | None:
    return room.compiled(problem.ours("reference")) if _speaks(problem) else None
