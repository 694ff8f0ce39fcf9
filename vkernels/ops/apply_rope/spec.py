"""Evidence for apply_rope."""

from __future__ import annotations

from vkernels.check import ShapeError
from vkernels.ops.apply_rope.api import BACKENDS, Call, apply_rope, prepare
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject


def _inputs(m: Maker, b: int, s: int, n: int, d: int) -> dict:
    angle = m.randn(1, s, d // 2).float()
    return {"x": m.randn(b, s, n, d), "cos": angle.cos(), "sin": angle.sin()}


def _cost(call: Call) -> Cost:
    return Cost(flop=3.0 * call.x.numel(), bytes=2.0 * call.x.numel() * call.x.element_size())


SPEC = OpSpec(
    name="apply_rope",
    fn=apply_rope,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("square", lambda m: _inputs(m, 2, 8, 4, 32)),
        Case("odd", lambda m: _inputs(m, 1, 7, 3, 72)),
        Case("empty", lambda m: _inputs(m, 1, 0, 3, 64)),
    ],
    rejects=[
        Reject(
            "rank",
            lambda m: {**_inputs(m, 1, 4, 2, 8), "cos": m.randn(4, 4)},
            ShapeError,
            r"apply_rope: cos must have shape \(b\|1 s r\), got \(4, 4\)",
        ),
    ],
    cost=_cost,
    source="RoFormer, arXiv:2104.09864",
    differentiable=("x",),
)
