"""Evidence for apply_rope."""

from __future__ import annotations

import torch

from vkernels.check import ShapeError
from vkernels.ops.apply_rope.api import BACKENDS, Call, apply_rope, prepare
from vkernels.rope import RopeSpec, rope_positions
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject, Shape


def _inputs(m: Maker, b: int, s: int, n: int, kv: int, d: int, spec: RopeSpec, pos: torch.Tensor | None = None) -> dict:
    pos = torch.arange(s) if pos is None else pos
    return {"q": m.randn(b, s, n, d), "k": m.randn(b, s, kv, d) if kv else None, "spec": spec, "pos": pos.to(m.device)}


def _cost(call: Call) -> Cost:
    elements = call.q.numel() + (0 if call.k is None else call.k.numel())
    return Cost(flop=3.0 * elements, bytes=2.0 * elements * call.q.element_size())


_MROPE = RopeSpec.build(128, 1e6, axes="mrope", sections=(16, 24, 24))
_VIDEO = RopeSpec.build(64, axes="videorope", sections=(8, 12, 12))
_YARN = RopeSpec.build(36, 1e6, "yarn", factor=4, original=32768, layout="pair", offset=8)
_PART = RopeSpec.build(24, layout="pair", offset=4)
_HEADS = RopeSpec.build(16, axes=((0,) * 8, (1,) * 8, (-1,) * 8))

SPEC = OpSpec(
    name="apply_rope",
    fn=apply_rope,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("plain", lambda m: _inputs(m, 2, 8, 4, 2, 32, RopeSpec.build(32))),
        Case("odd", lambda m: _inputs(m, 1, 7, 3, 1, 72, RopeSpec.build(72))),
        Case("mrope", lambda m: _inputs(m, 1, 14, 4, 2, 128, _MROPE, rope_positions("qwen2_vl", [2, (2, 2, 3)]))),
        Case(
            "real",
            lambda m: _inputs(m, 1, 14, 2, 2, 64, _VIDEO, rope_positions("videorope", [2, (2, 2, 3)], delta=0.7)),
        ),
        Case("partial_pairs_yarn", lambda m: _inputs(m, 2, 5, 3, 0, 80, _YARN, m.randint(0, 99, 1, 2, 5))),
        Case("heads", lambda m: _inputs(m, 1, 5, 6, 3, 16, _HEADS, m.randint(0, 99, 2, 5))),
        Case(
            "axial",
            lambda m: _inputs(m, 1, 6, 2, 2, 24, RopeSpec.grid((12, 12), layout="axial"), m.randint(0, 9, 2, 6)),
        ),
        Case("inverse", lambda m: {**_inputs(m, 1, 5, 2, 2, 48, RopeSpec.build(32)), "inverse": True}),
        Case("hf_fp32", lambda m: {**_inputs(m, 1, 5, 2, 2, 32, RopeSpec.build(32)), "angle": "hf_fp32"}),
        Case(
            "two_angles",
            lambda m: {**_inputs(m, 2, 5, 3, 1, 32, _PART), "angle": (m.randn(2, 5, 2, 12), m.randn(1, 5, 2, 12))},
        ),
        Case("empty", lambda m: _inputs(m, 1, 0, 3, 1, 64, RopeSpec.build(64))),
    ],
    shapes=[
        Shape("llama", lambda m: _inputs(m, 1, 8192, 32, 32, 128, RopeSpec.build(128)), "LLaMA-7B, 8,192 tokens"),
        Shape(
            "qwen2_vl",
            lambda m: _inputs(m, 1, 8192, 28, 4, 128, _MROPE, torch.zeros(3, 8192, dtype=torch.int64)),
            "Qwen2-VL-7B, 8,192 tokens",
            dtypes=(torch.bfloat16, torch.float32),
        ),
        Shape(
            "siglip",
            lambda m: _inputs(
                m, 8, 729, 16, 16, 72, RopeSpec.grid((36, 36), layout="pair"), torch.zeros(2, 729, dtype=torch.int64)
            ),
            "a vision tower with head size 72",
        ),
        Shape(
            "vjepa2",
            lambda m: {
                **_inputs(m, 8, 2048, 16, 0, 64, RopeSpec.build(60, layout="pair")),
                "angle": (m.randn(1, 2048, 2, 30), m.randn(1, 2048, 2, 30)),
            },
            "V-JEPA2's neighbours, each by an angle of its own",
        ),
        Shape(
            "videorope",
            lambda m: _inputs(m, 1, 8192, 28, 4, 64, _VIDEO, torch.zeros(3, 8192)),
            "real positions",
        ),
    ],
    rejects=[
        Reject(
            "rank",
            lambda m: {**_inputs(m, 1, 4, 2, 1, 8, RopeSpec.build(8)), "q": m.randn(4, 8)},
            ShapeError,
            r"apply_rope: q must have shape \(b s n d\), got \(4, 8\)",
        ),
        Reject(
            "pos",
            lambda m: _inputs(m, 1, 4, 2, 1, 8, RopeSpec.build(8), torch.arange(3)),
            ValueError,
            r"apply_rope: pos must have shape \(axes=1, s=4\)",
        ),
        Reject(
            "nan",
            lambda m: _inputs(m, 1, 2, 2, 1, 8, RopeSpec.build(8), torch.tensor([0.0, float("nan")])),
            ValueError,
            "apply_rope: pos must be finite and below 2\\^31 in magnitude, got nan",
        ),
        Reject(
            "two_angles_of_halves",
            lambda m: {**_inputs(m, 1, 2, 2, 1, 8, RopeSpec.build(8)), "angle": (m.randn(1, 2, 2, 4),) * 2},
            ValueError,
            "apply_rope: spec must have layout='pair' where each member has its own angle, got 'half'",
        ),
        Reject(
            "two_angles_undone",
            lambda m: {
                **_inputs(m, 1, 5, 2, 1, 32, _PART),
                "angle": (m.randn(1, 5, 2, 12),) * 2,
                "inverse": True,
            },
            ValueError,
            "apply_rope: inverse must be False where each member of a pair has its own angle, got True",
        ),
    ],
    cost=_cost,
    source="RoFormer, arXiv:2104.09864",
    differentiable=("q", "k"),
)
