"""Evidence for divided_attention."""

from __future__ import annotations

from typing import Any

import torch

from vkernels.check import ShapeError
from vkernels.masks.grid import Grid
from vkernels.ops.divided_attention.api import BACKENDS, Call, composed_because, divided_attention, prepare
from vkernels.rope import RopeSpec
from vkernels.spec import Case, Cost, Maker, OpSpec, Reject, Shape

_FLOAT32 = (torch.float32,)


def _inputs(
    maker: Maker, b: int, grid: Grid, n: int, d: int, m: int | None = None, rope: Any = None, **options
) -> dict:
    s = options.get("cls", 0) + grid.tokens
    q, k, v = (maker.randn(b, s, heads, d) for heads in (n, m or n, m or n))
    if rope is not None:
        options["rope"] = rope[0], rope[1].to(maker.device)
    return {"q": q, "k": k, "v": v, "grid": grid, **options}


def _case(case: str, *args, **options) -> Case:
    return Case(case, lambda maker: _inputs(maker, *args, **options))


def _shape(model: str, case: str, *args, **options) -> Shape:
    return Shape(case, lambda maker: _inputs(maker, *args, **options), model, tensor_cores=True)


def _rows(why: str, *sizes: int, spills: tuple[int, int] = (0, 0), **options) -> list[Shape]:
    """A packed and a tiled call for each head size, and the local memory of either."""

    def row(d: int, kind: str, grid: Grid, axis: str, spilled: int) -> Shape:
        def make(m: Maker) -> dict:
            return _inputs(m, 1, grid, 2, d, axis=axis, cls=1)

        floats = "float32-" if options.get("dtypes") == _FLOAT32 else ""
        return Shape(f"{floats}{kind}-d{d}", make, why, tensor_cores=not floats, spills=spilled, **options)

    packed, tiled = ("packed", Grid(8, 4, 4), "temporal", spills[0]), ("tiled", Grid(2, 16, 16), "spatial", spills[1])
    return [row(d, *kind) for d in sizes for kind in (packed, tiled)]


def _reject(case: str, error: type[Exception], match: str, **change) -> Reject:
    def make(maker: Maker) -> dict:
        return {**_inputs(maker, 1, Grid(4, 2, 2), 2, 16), **change}

    return Reject(case, make, error, f"divided_attention: {match}")


_YARN = RopeSpec.build(24, 1e4, "yarn", factor=4, original=4, layout="pair")
_TIMES = torch.tensor([[0.0, 0.7, 1.9], [2.0, 2.5, 8.0]])  # b t


def _cost(call: Call) -> Cost:
    b, s, n, d = call.q.shape
    m, groups = call.k.shape[2], call.t // call.frames_per_group
    if call.axis == "temporal":
        pairs = groups * call.l * call.frames_per_group**2
    else:
        pairs = groups * (call.cls + call.frames_per_group * call.l) ** 2
    return Cost(flop=4.0 * b * n * d * pairs, bytes=2.0 * b * s * (n + m) * d * call.q.element_size())


def _notes(call: Call) -> list[str]:
    if call.rope is None:
        return []
    reason = composed_because(call)
    inside = "the CUDA kernels turn q and k inside" if reason is None else f"not inside the CUDA kernels: {reason}"
    return [f"rope: {inside}; other backends run apply_rope first"]


SPEC = OpSpec(
    name="divided_attention",
    fn=divided_attention,
    prepare=prepare,
    backends=BACKENDS,
    cases=[
        _case("temporal-t8", 2, Grid(8, 1, 3), 2, 64),
        _case("temporal-cls-t16", 1, Grid(16, 1, 2), 2, 88, cls=1),
        _case("temporal-patch-major", 2, Grid(5, 1, 3), 2, 72, m=1, order="patch", cls=1),
        _case("temporal-halves", 1, Grid(10, 1, 2), 2, 24, frames_per_group=5, scale=0.3),
        _case("temporal-long", 1, Grid(35, 1, 1), 2, 40, m=1, cls=1),
        _case("spatial-cls", 2, Grid(3, 3, 3), 1, 64, axis="spatial", cls=1),
        _case("spatial-cls-patch-major", 1, Grid(2, 1, 17), 2, 80, m=1, axis="spatial", cls=1, order="patch"),
        _case("spatial-pairs", 1, Grid(4, 1, 9), 1, 128, axis="spatial", cls=1, frames_per_group=2),
        _case("spatial", 2, Grid(2, 1, 5), 3, 8, axis="spatial"),
        _case("temporal-rope", 1, Grid(3, 1, 2), 1, 64, cls=1, rope=(RopeSpec.build(64), torch.arange(3))),
        _case("temporal-rope-pairs", 2, Grid(3, 1, 1), 1, 24, order="patch", rope=(_YARN, _TIMES)),
        _case("temporal-rope-long", 1, Grid(17, 1, 1), 2, 24, m=1, rope=(RopeSpec.build(24), torch.arange(17))),
        _case("empty", 0, Grid(2, 2, 2), 2, 64, axis="spatial"),
    ],
    shapes=[
        _shape("TimeSformer-B, 8 frames", "temporal-t8", 8, Grid(8, 14, 14), 12, 64, cls=1),
        _shape("BT-Adapter on EVA-g, 16 frames", "temporal-t16", 16, Grid(16, 16, 16), 16, 88, cls=1, order="patch"),
        _shape("BT-Adapter on CLIP-L, 64 frames", "temporal-t64", 4, Grid(64, 16, 16), 16, 64, cls=1, order="patch"),
        _shape("LanguageBind, 128 frames", "temporal-t128", 1, Grid(128, 16, 16), 16, 64),
        _shape("BT-Adapter on CLIP-L, 257", "spatial-257", 4, Grid(64, 16, 16), 16, 64, axis="spatial", cls=1),
        _shape("BT-Adapter on EVA-g, 257", "spatial-257-d88", 16, Grid(16, 16, 16), 16, 88, axis="spatial", cls=1),
        _shape("CLIP-L/336, 577", "spatial-577", 2, Grid(16, 24, 24), 16, 64, axis="spatial", cls=1, order="patch"),
    ],
    rows=[
        *_rows("Gemma's head size; backward, the 64 rows of HGMMA leave a lane no registers", 256, hmma=True),
        *_rows("CogVideoX's head size and others up to 128", 96, 128),
        *_rows("rows of float32 beside their tf32 halves", 64, 128, dtypes=_FLOAT32),
        *_rows("16 rows of 256 float32 and their tf32 halves do not fit", 256, dtypes=_FLOAT32, spills=(120, 840)),
    ],
    rejects=[
        _reject("grid", ValueError, r"grid must cover the tokens \(cls \+ t\*h\*w = 12 of them\)", grid=Grid(3, 2, 2)),
        _reject("grid-type", TypeError, r"grid must be a Grid\(t, h, w\), got tuple", grid=(4, 2, 2)),
        _reject("axis", ValueError, "axis must be one of temporal, spatial, got 'time'", axis="time"),
        _reject("order", ValueError, "order must be one of frame, patch, got 'row'", order="row"),
        _reject("cls", ValueError, "cls must be 0 or 1, got 2", cls=2),
        _reject("rope", TypeError, r"rope must be a pair \(spec, positions\), got int", rope=3),
        _reject("rope-spec", TypeError, "rope must begin with a RopeSpec, got int", rope=(3, torch.arange(4))),
        _reject("rope-type", TypeError, "rope must end with a tensor of positions, got int", rope=(_YARN, 3)),
        _reject(
            "rope-frames",
            ValueError,
            r"rope must have a position for each of the 4 frames, got \(16,\)",
            rope=(_YARN, torch.arange(16)),
        ),
        _reject(
            "rope-patches",
            ValueError,
            r"rope must have a position for each of the 4 patches of a frame, got \(2, 6\)",
            axis="spatial",
            rope=(_YARN, torch.zeros(2, 6)),
        ),
        _reject(
            "rope-axes",
            ValueError,
            r"pos must have shape \(axes=2, s=4\) or \(axes=2, b=1, s=4\), got \(1, 1, 4\)",
            rope=(RopeSpec.grid((8, 8)), torch.arange(4)),
        ),
        _reject("groups", ValueError, "frames_per_group must divide the 4 frames, got 3", frames_per_group=3),
        Reject(
            "heads",
            lambda m: _inputs(m, 1, Grid(2, 1, 1), 3, 8, m=2),
            ValueError,
            "divided_attention: q must have a multiple of the heads of k, got n=3 m=2",
        ),
        Reject(
            "tokens",
            lambda m: {**_inputs(m, 1, Grid(2, 1, 1), 2, 8), "k": m.randn(1, 3, 2, 8)},
            ShapeError,
            r"divided_attention: k must have shape \(b s m d\), got \(1, 3, 2, 8\)",
        ),
    ],
    cost=_cost,
    source="TimeSformer, arXiv:2102.05095; BT-Adapter, arXiv:2309.15785",
    differentiable=("q", "k", "v"),
    notes=_notes,
)
