"""Evidence for rearrange."""

from __future__ import annotations

import torch

from vkernels import rearrangement as plans
from vkernels.check import ShapeError
from vkernels.ops.rearrange.api import BACKENDS, Call, prepare, rearrange
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject, Shape


def _epilogue(m: Maker) -> dict:
    keep = torch.tensor([[8, 1, 1, 4, 0], [2, 3, 5, 7, 8]])
    return {
        "x": m.randn(2, 9, 40),
        "plan": plans.keep(indices=keep, n=9),
        "bias": m.randn(40),
        "gate": m.randn(40),
        "scale": 0.5,
        "residual": m.randn(2, 5, 40),
        "norm": "layer",
        "norm_weight": m.randn(40),
        "norm_bias": m.randn(40),
        "return_sum": True,
    }


def _assemble(m: Maker) -> dict:
    video = plans.pool(2, 3, 5, mode="bilinear").compose(plans.newline(2, 2, 3))
    plan = plans.assemble([("text", 3), ("video", 16), ("text", 2)], video=video)
    return {"x": [m.randn(1, 5, 24), m.randn(1, 30, 24)], "plan": plan, "fill": m.randn(1, 24)}


def _keep_norm(m: Maker, b: int = 32, s: int = 32 * 257, c: int = 1408) -> dict:
    return {
        "x": m.randn(b, s, c),
        "plan": plans.keep(indices=torch.arange(0, s, 2), n=s),
        "norm": "layer",
        "norm_weight": m.randn(c),
        "norm_bias": m.randn(c),
    }


def _half(m: Maker, s: int, c: int) -> dict:
    return {"x": m.randn(1, s, c), "plan": plans.keep(indices=torch.arange(0, s, 2), n=s)}


def _moves(name: str, dtype: torch.dtype) -> list[Shape]:
    def move(kind: str, to: str) -> Shape:
        def make(m: Maker) -> dict:
            return {"x": m.randn(2, 16, 64, 1024), "plan": plans.from_einops(to)}

        return Shape(f"{name}-{kind}", make, name, (dtype,), gradients=False)

    return [move("runs", "b t l c -> b l t c"), move("turn", "b t l c -> b c l t")]


def _assemble_embeddings(m: Maker) -> dict:
    plan = plans.assemble(
        [("text", 35), ("video", 16 * 256), ("text", 60)], video=plans.newline(16, 16, 16, mode="none")
    )
    return {"x": [m.randn(8, 95, 4096), m.randn(8, 16 * 256, 4096)], "plan": plan}


def _pool_newline(m: Maker) -> dict:
    plan = plans.pool(64, 27, 27, mode="bilinear").compose(plans.newline(64, 14, 14))
    return {"x": m.randn(1, 64 * 729, 3584), "plan": plan, "fill": m.randn(1, 3584)}


def _cost(call: Call) -> Cost:
    size = call.x[0].element_size()
    made = 1
    for n in call.shape:
        made *= n
    read = sum(x.numel() for x in call.x) if call.affine is not None or call.plan.ptr is not None else made
    again = made * ((call.residual is not None) + call.return_sum + call.accumulate)
    taps = 0 if call.affine is not None or call.plan.idx is None else call.plan.idx.shape[-1] * call.x[0].shape[-1]
    return Cost(
        flop=2.0 * taps + 8.0 * made * (call.norm is not None),
        bytes=float(size * (min(read, made * 64) + made + again)),
    )


def plan_and_inverse_are_the_identity(backend: str, device: str) -> None:
    x = torch.randn(2, 24, 5, device=device)
    for plan in (
        plans.temporal(4, 6),
        plans.window(1, 4, 6, 4),
        plans.interleave_clips(2, 3, 4),
        plans.merge_order(1, 4, 6),
    ):
        y = rearrange(x, plan, backend=backend)
        assert isinstance(y, torch.Tensor)
        back = rearrange(y, plan.inverse, backend=backend)
        assert isinstance(back, torch.Tensor)
        assert torch.equal(back.view_as(x), x)


def a_composition_is_one_run_after_the_other(backend: str, device: str) -> None:
    x = torch.randn(2, 36, 5, device=device)
    first, then = plans.pool(1, 6, 6, stride=2), plans.keep(indices=torch.tensor([7, 7, 0, 3]), n=9)
    twice = rearrange(rearrange(x, first, backend=backend), then, backend=backend)
    torch.testing.assert_close(rearrange(x, first.compose(then), backend=backend), twice)


_FLOAT32 = (torch.float32,)

SPEC = OpSpec(
    name="rearrange",
    fn=rearrange,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        Case("epilogue", _epilogue),
        Case("temporal", lambda m: {"x": m.randn(2, 13, 24), "plan": plans.temporal(3, 4, cls=1)}),
        Case(
            "einops",
            lambda m: {"x": m.randn(2, 3, 6, 10), "plan": plans.from_einops("b t (h w) c -> (b h) c w t", h=2)},
        ),
        Case("repeat", lambda m: {"x": m.randn(2, 3, 10), "plan": plans.from_einops("b s c -> b r s c", r=4)}),
        Case(
            "affine-norm",
            lambda m: {
                "x": m.randn(2, 3, 6, 33),
                "plan": plans.from_einops("b t l c -> (b l) t c"),
                "norm": "rms",
                "norm_weight": m.randn(33),
            },
        ),
        Case("assemble", _assemble),
        Case("max", lambda m: {"x": m.randn(2, 20, 19), "plan": plans.pool(1, 4, 5, mode="max", ceil=True)}),
        Case(
            "cls",
            lambda m: {
                "x": m.randn(6, 5, 16),
                "plan": plans.spatial_back(3, 4, cls="mean"),
                "residual": m.randn(2, 13, 16),
            },
        ),
        Case(
            "empty",
            lambda m: {"x": m.randn(2, 0, 8), "plan": plans.keep(indices=torch.zeros(0, dtype=torch.int64), n=0)},
        ),
    ],
    shapes=[
        Shape(
            "st_llm_keep_norm", _keep_norm, "ST-LLM, half of 32 frames of 257 tokens, LayerNorm 1,408", gradients=False
        ),
        Shape("llm_keep_norm", lambda m: _keep_norm(m, 8, 8192, 4096), "half of 8,192 tokens of 4,096, LayerNorm"),
        Shape("wide_norm", lambda m: _keep_norm(m, 2, 4096, 12288), "half of 4,096 tokens of 12,288, LayerNorm"),
        Shape("st_llm_assemble", _assemble_embeddings, "text, 16 frames and a newline into the embeddings of a 7B LLM"),
        Shape(
            "onevision_pool", _pool_newline, "LLaVA-OneVision, 64 frames 27 x 27 -> 14 x 14, newlines, 3,584 channels"
        ),
        Shape(
            "max_pool",
            lambda m: {"x": m.randn(1, 32 * 24 * 24, 1024), "plan": plans.pool(32, 24, 24, mode="max")},
            "2 x 2 maxima",
        ),
        Shape(
            "bt_adapter_back",
            lambda m: {
                "x": m.randn(8 * 256, 32, 1024),
                "plan": plans.temporal_back(32, 256),
                "gate": m.randn(1024),
                "residual": m.randn(8, 32 * 256, 1024),
            },
            "BT-Adapter, the temporal branch's way back into the residual stream",
            dtypes=(torch.bfloat16, torch.float32),
        ),
        Shape("temporal", lambda m: {"x": m.randn(16, 32, 256, 1024), "plan": plans.from_einops("b t l c -> b l t c")}),
        Shape("channels_first", lambda m: {"x": m.randn(64, 2048, 1024), "plan": plans.from_einops("b s c -> b c s")}),
    ],
    rows=[
        Shape("float32-norm", lambda m: _keep_norm(m, 1, 64, 1024), "float32", _FLOAT32),
        Shape("float32-norm-in-parts", lambda m: _keep_norm(m, 1, 64, 12288), "float32", _FLOAT32),
        Shape(
            "gate-8192",
            lambda m: {**_half(m, 64, 8192), "gate": m.randn(8192), "residual": m.randn(1, 32, 8192)},
            "gradients of rows beyond 4,096",
        ),
        Shape("norm-8192", lambda m: _keep_norm(m, 1, 64, 8192), "LLaMA-2-70B's rows"),
        Shape(
            "float32-means",
            lambda m: {"x": m.randn(1, 16 * 16, 1024), "plan": plans.frame_mean(16, 16)},
            "many taps in float32",
            _FLOAT32,
        ),
        Shape("float32-rows", lambda m: _half(m, 64, 1024), "float32", _FLOAT32),
        Shape("int64-rows", lambda m: _half(m, 64, 1024), "8 bytes an element", (torch.int64,), gradients=False),
        *_moves("float32", torch.float32),
        *_moves("int64", torch.int64),
    ],
    rejects=[
        Reject(
            "rows",
            lambda m: {"x": m.randn(1, 5, 8), "plan": plans.temporal(2, 3)},
            ShapeError,
            r"x must have 6 rows for RearrangePlan.temporal\(6 rows -> 6\), got \(1, 5, 8\)",
        ),
        Reject(
            "plan",
            lambda m: {"x": m.randn(1, 5, 8), "plan": "b s c -> s b c"},
            TypeError,
            "plan must be a RearrangePlan, got str",
        ),
        Reject(
            "fill",
            lambda m: {"x": m.randn(1, 4, 8), "plan": plans.newline(1, 2, 2)},
            ValueError,
            "fill must hold the 1 fill vectors of",
        ),
        Reject(
            "ints",
            lambda m: {"x": m.randint(0, 9, 1, 4, 8), "plan": plans.pool(1, 2, 2)},
            ValueError,
            "must be a float dtype unless single rows",
        ),
        Reject(
            "gate",
            lambda m: {"x": m.randn(1, 4, 8), "plan": plans.merge_order(1, 2, 2), "gate": m.randn(4)},
            ShapeError,
            r"gate must have shape \(8\) or hold one value, got \(4,\)",
        ),
        Reject(
            "residual",
            lambda m: {"x": m.randn(1, 4, 8), "plan": plans.pool(1, 2, 2), "residual": m.randn(1, 4, 8)},
            ShapeError,
            r"residual must have shape \(1, 1, 8\), got \(1, 4, 8\)",
        ),
        Reject(
            "norm",
            lambda m: {"x": m.randn(1, 4, 8), "plan": plans.pool(1, 2, 2), "norm": "batch"},
            ValueError,
            "norm must be 'layer', 'rms' or None, got 'batch'",
        ),
        Reject(
            "axes",
            lambda m: {"x": m.randn(4, 8), "plan": plans.from_einops("b s c -> s b c")},
            ShapeError,
            r"x must have 3 axes for 'b s c -> s b c', got \(4, 8\)",
        ),
        Reject(
            "twice",
            lambda m: {
                "x": m.randn(1, 4, 8),
                "plan": plans.merge_order(1, 2, 2),
                "out": m.randn(1, 4, 8),
                "rows": torch.tensor([0, 1, 1, 2]),
            },
            ValueError,
            "rows must name no row twice, got 1",
        ),
    ],
    cost=_cost,
    source="BT-Adapter arXiv:2309.15785, ST-LLM arXiv:2404.00308, LLaVA-OneVision arXiv:2408.03326",
    differentiable=("x", "bias", "gate", "residual", "norm_weight", "norm_bias", "fill"),
    laws=[plan_and_inverse_are_the_identity, a_composition_is_one_run_after_the_other],
)
