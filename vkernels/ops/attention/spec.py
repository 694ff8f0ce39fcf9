"""Evidence for attention."""

from __future__ import annotations

from typing import Any

import torch

from vkernels.check import ShapeError
from vkernels.masks import Grid, VideoMask
from vkernels.masks.stats import visible_pairs
from vkernels.ops.attention.api import BACKENDS, Call, attention, prepare
from vkernels.rope import RopeSpec
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject, Shape


def _inputs(
    maker: Maker, b: int, s_q: int, n: int, d: int, *, s_k: int | None = None, m: int | None = None, **more: Any
) -> dict[str, Any]:
    s_k, m = s_q if s_k is None else s_k, n if m is None else m
    q, k, v = maker.randn(b, s_q, n, d), maker.randn(b, s_k, m, d), maker.randn(b, s_k, m, d)
    return {"q": q, "k": k, "v": v, "return_lse": True, **more}


def _rope(maker: Maker) -> tuple[RopeSpec, torch.Tensor]:
    return RopeSpec.build(24, layout="pair"), torch.arange(30, device=maker.device) // 6


def _keep(maker: Maker, b: int, s: int, queries: bool) -> VideoMask:
    keep = torch.rand(b, s, generator=maker.generator) < 0.5  # a mask is built on the host
    return VideoMask.frame_causal(Grid(s // 12, 3, 4)).keep(keep, queries=queries)


def _visible_pairs(call: Call) -> float:
    if call.mask is None:
        return float(call.q.shape[0] * call.q.shape[1] * call.k.shape[1])
    plan = call.mask.plan("cpu") if isinstance(call.mask, VideoMask) else call.mask
    visible, samples = visible_pairs(plan)
    return float(visible) * call.q.shape[0] / samples


def _cost(call: Call) -> Cost:
    n, d = call.q.shape[2:]
    moved = 2 * call.q.numel() + call.k.numel() + call.v.numel()
    return Cost(flop=4.0 * _visible_pairs(call) * n * d, bytes=float(moved * call.q.element_size()))


def law_constant_values_pass_through(backend: str, device: str) -> None:
    """Probabilities sum to one: where every value is the same vector, so is every output that sees a key."""
    maker = Maker(device=device)
    kwargs = _inputs(maker, 2, 36, 2, 24, mask=_keep(maker, 2, 36, True))
    kwargs["v"] = maker.randn(1, 1, 2, 24).expand(2, 36, 2, 24)
    out, lse = attention(**kwargs, backend=backend)
    sees = torch.isfinite(lse).transpose(1, 2)[..., None]
    assert sees.any()
    assert not sees.all()
    torch.testing.assert_close(out, kwargs["v"] * sees, rtol=1e-5, atol=1e-5)


_FLOAT32 = (torch.float32,)

SPEC = OpSpec(
    name="attention",
    fn=attention,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("grouped", lambda m: _inputs(m, 2, 13, 4, 8, s_k=21, m=2)),
        Case("long", lambda m: _inputs(m, 1, 150, 2, 64, s_k=1100)),
        Case("odd", lambda m: _inputs(m, 1, 65, 1, 88, scale=-0.2)),
        Case("frame_causal", lambda m: _inputs(m, 1, 81, 2, 72, mask=VideoMask.frame_causal(Grid(9, 3, 3)))),
        Case("temporal", lambda m: _inputs(m, 2, 60, 2, 16, mask=VideoMask.temporal(Grid(5, 3, 4)))),
        Case("keep", lambda m: _inputs(m, 2, 84, 4, 32, m=1, mask=_keep(m, 2, 84, True))),
        Case("keep_keys", lambda m: _inputs(m, 2, 84, 2, 40, mask=_keep(m, 2, 84, False))),
        Case(
            "window",
            lambda m: _inputs(m, 1, 141, 2, 24, mask=VideoMask.window(Grid(4, 5, 7), (3, 3, 3)).with_globals()),
        ),
        Case("rope", lambda m: _inputs(m, 2, 30, 4, 24, m=2, mask=VideoMask.temporal(Grid(5, 2, 3)), rope=_rope(m))),
        Case("no_queries", lambda m: _inputs(m, 1, 0, 2, 16, s_k=5)),
        Case("no_keys", lambda m: _inputs(m, 1, 5, 2, 16, s_k=0)),
    ],
    shapes=[
        Shape("siglip", lambda m: _inputs(m, 16, 729, 16, 72), "SigLIP, 16 frames", tensor_cores=True),
        Shape(
            "frame_causal",
            lambda m: _inputs(m, 1, 8192, 32, 128, m=8, mask=VideoMask.frame_causal(Grid(32, 16, 16))),
            "LLM prefill, 32 frames of 256, grouped heads",
            tensor_cores=True,
        ),
        Shape(
            "keep",
            lambda m: _inputs(
                m, 2, 4096, 16, 88, mask=VideoMask.joint(Grid(16, 16, 16)).keep(m.rand_bool(2, 4096), queries=True)
            ),
            "EVA, half of the tokens kept",
            tensor_cores=True,
        ),
        Shape(
            "temporal",
            lambda m: _inputs(m, 4, 4096, 16, 64, mask=VideoMask.temporal(Grid(16, 16, 16))),
            "BT-Adapter, 16 frames of 256 patches",
            tensor_cores=True,
        ),
        Shape(
            "window",
            lambda m: _inputs(m, 1, 4096, 16, 80, mask=VideoMask.window(Grid(16, 16, 16), (2, 4, 4))),
            "an exact 3-D window",
            gradients=False,
            tensor_cores=True,
        ),
        Shape("float32", lambda m: _inputs(m, 1, 4096, 16, 64), "float32 in three tf32 products", _FLOAT32),
    ],
    rows=[
        Shape(
            "d256",
            lambda m: _inputs(m, 1, 256, 2, 256),
            "Gemma's head size; sums of dk and dv for the 64 keys of HGMMA leave a lane no registers",
            tensor_cores=True,
            hmma=True,
        ),
        Shape("float32-d128", lambda m: _inputs(m, 1, 256, 2, 128), "float32", _FLOAT32),
        Shape(
            "float32-d256",
            lambda m: _inputs(m, 1, 256, 2, 256),
            "16 rows of 256 float32 and their tf32 halves are 256 registers of a lane; dense scores would cost more",
            _FLOAT32,
            spills=32,
        ),
    ],
    rejects=[
        Reject(
            "rank",
            lambda m: {**_inputs(m, 1, 4, 2, 8), "q": m.randn(4, 2, 8)},
            ShapeError,
            r"attention: q must have shape \(b s_q n d\), got \(4, 2, 8\)",
        ),
        Reject(
            "head size",
            lambda m: {**_inputs(m, 1, 4, 2, 8), "k": m.randn(1, 4, 2, 16)},
            ShapeError,
            r"attention: k must have shape \(b s_k m d\), got \(1, 4, 2, 16\); axes so far: b=1 s_q=4 n=2 d=8",
        ),
        Reject(
            "heads",
            lambda m: _inputs(m, 1, 4, 3, 8, m=2),
            ValueError,
            "attention: q must have a multiple of the 2 key heads as heads, got 3",
        ),
        Reject(
            "dtype",
            lambda m: {**_inputs(m, 1, 4, 2, 8), "v": m.randn(1, 4, 2, 8).half()},
            TypeError,
            r"attention: v must have the dtype of q \(float32\), got float16",
        ),
        Reject(
            "mask tokens",
            lambda m: _inputs(m, 1, 4, 2, 8, mask=VideoMask.causal(5)),
            ValueError,
            "attention: mask must speak of 4 x 4 tokens, got 5 x 5",
        ),
        Reject(
            "mask samples",
            lambda m: _inputs(m, 3, 4, 2, 8, mask=VideoMask.causal(4).keep(m.rand_bool(2, 4))),
            ValueError,
            "attention: mask must be given for 1 or 3 samples, got 2",
        ),
        Reject(
            "mask type",
            lambda m: _inputs(m, 1, 4, 2, 8, mask=torch.ones(4, 4, dtype=torch.bool)),
            TypeError,
            "attention: mask must be a VideoMask or a MaskPlan, got Tensor",
        ),
        Reject(
            "scale",
            lambda m: _inputs(m, 1, 4, 2, 8, scale=float("nan")),
            ValueError,
            "attention: scale must be a finite number, got nan",
        ),
        Reject(
            "rope",
            lambda m: _inputs(m, 1, 4, 2, 8, rope=3),
            TypeError,
            r"attention: rope must be a pair \(spec, positions\), got int",
        ),
    ],
    cost=_cost,
    source="FlashAttention, arXiv:2205.14135",
    differentiable=("q", "k", "v"),
    laws=(law_constant_values_pass_through,),
)
