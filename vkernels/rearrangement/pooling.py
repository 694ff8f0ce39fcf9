"""Plans that average, take maxima of, or interpolate between tokens; and the newline tokens that follow."""

from __future__ import annotations

import math

import torch

from vkernels.check import require
from vkernels.rearrangement.layout import merge_order, whole_numbers
from vkernels.rearrangement.plan import RearrangePlan, csr, gather

Taps = list[tuple[list[int], list[float]]]  # per output position: input positions and weights on one axis


def _blocks(n: int, stride: int, ceil: bool) -> Taps:
    count = -(-n // stride) if ceil else n // stride
    spans = [range(i * stride, min((i + 1) * stride, n)) for i in range(count)]
    return [(list(span), [1.0 / len(span)] * len(span)) for span in spans]


def _adaptive(n: int, out: int) -> Taps:
    spans = [range(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]
    return [(list(span), [1.0 / len(span)] * len(span)) for span in spans]


def _linear(n: int, out: int, align_corners: bool) -> Taps:
    taps: Taps = []
    for i in range(out):
        x = i * (n - 1) / (out - 1) if align_corners and out > 1 else 0.0
        if not align_corners:
            x = max((i + 0.5) * n / out - 0.5, 0.0)
        low = min(int(x), n - 1)
        share = x - low if low + 1 < n else 0.0
        pairs = [(low, 1.0 - share), (low + 1, share)]
        taps.append(([j for j, v in pairs if v != 0.0], [v for _, v in pairs if v != 0.0]))
    return taps


def _cubic(n: int, out: int, align_corners: bool) -> Taps:
    a = -0.75  # torch's kernel

    def kernel(d: float) -> float:
        d = abs(d)
        if d <= 1:
            return ((a + 2) * d - (a + 3)) * d * d + 1
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0

    taps: Taps = []
    for i in range(out):
        x = (i * (n - 1) / (out - 1) if out > 1 else 0.0) if align_corners else (i + 0.5) * n / out - 0.5
        base = math.floor(x)
        merged: dict[int, float] = {}
        for j in range(base - 1, base + 3):
            at = min(max(j, 0), n - 1)
            merged[at] = merged.get(at, 0.0) + kernel(x - j)
        kept = {j: v for j, v in merged.items() if v != 0.0}
        taps.append((list(kept), list(kept.values())))
    return taps


def _product(name: str, sizes: tuple[int, int, int], axes: tuple[Taps, Taps, Taps], reduce: str) -> RearrangePlan:
    """Outer product of three axes' taps as CSR, t outermost."""
    ptr, parts, weights = [0], [], []
    _, h, w = sizes
    t_axis, h_axis, w_axis = axes
    for t_at, t_weight in t_axis:
        for h_at, h_weight in h_axis:
            lead = torch.tensor([a * h + b for a in t_at for b in h_at], dtype=torch.int64) * w
            lead_weight = torch.tensor([a * b for a in t_weight for b in h_weight], dtype=torch.float64)
            for w_at, w_weight in w_axis:
                parts.append((lead[:, None] + torch.tensor(w_at)).flatten())
                weights.append((lead_weight[:, None] * torch.tensor(w_weight, dtype=torch.float64)).flatten())
                ptr.append(ptr[-1] + len(parts[-1]))
    idx = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    weight = torch.cat(weights).float() if weights else torch.zeros(0)
    plain = reduce == "max" or bool((weight == 1).all())
    return csr(name, ptr, idx, None if plain else weight, (sizes[0] * h * w,), reduce=reduce)


def pool(t: int, h: int, w: int, *, mode: str = "mean", stride: int = 2, ceil: bool = False) -> RearrangePlan:
    """Pool every frame's grid (LLaVA-OneVision, LLaVA-Video): (b t*h*w c) -> (b t*h'*w' c).

    mode "mean" and "max" take stride x stride blocks, h' = h // stride (ceil=True keeps the smaller blocks at the
    border); "bilinear" samples h' = ceil(h / stride) points as torch's interpolate does (align_corners=False).
    """
    whole_numbers("pool", t=t, h=h, w=w)
    whole_numbers("pool", 1, stride=stride)
    require(mode in ("mean", "max", "bilinear"), "pool", "mode", "be 'mean', 'max' or 'bilinear'", repr(mode))
    if mode == "bilinear":
        rows, columns = (_linear(n, -(-n // stride), False) for n in (h, w))
    else:
        rows, columns = (_blocks(n, stride, ceil) for n in (h, w))
    frame = _product("pool", (1, h, w), (_blocks(1, 1, False), rows, columns), "max" if mode == "max" else "sum")
    return _each_frame(frame, t)


def _each_frame(plan: RearrangePlan, t: int) -> RearrangePlan:
    """The plan of one frame for t frames in a row."""
    nnz, rows = plan.index.shape[1], plan.sources[0]
    step = torch.arange(t, dtype=torch.int32)[:, None]
    idx = (plan.index + step * rows).view(1, -1)
    starts = (plan.starts[:, :-1] + step * nnz).view(-1)
    ptr = torch.cat([starts, starts.new_tensor([t * nnz])])
    weight = None if plan.weight is None else plan.weight.expand(t, -1).reshape(-1)
    return csr(plan.name, ptr, idx, weight, (t * rows,), reduce=plan.reduce)


def adaptive_pool(t: int, h: int, w: int, *, out: tuple[int, int, int]) -> RearrangePlan:
    """PLLaVA: AdaptiveAvgPool3d over the token grid, (b t*h*w c) -> (b t'*h'*w' c)."""
    whole_numbers("adaptive_pool", 1, t=t, h=h, w=w)
    require(len(out) == 3 and min(out) > 0, "adaptive_pool", "out", "be three sizes above 0", out)
    axes = (_adaptive(t, out[0]), _adaptive(h, out[1]), _adaptive(w, out[2]))
    return _product("adaptive_pool", (t, h, w), axes, "sum")


def frame_mean(t: int, l: int) -> RearrangePlan:  # noqa: E741
    """Mean over time, patch by patch: (b t*l c) -> (b l c)."""
    whole_numbers("frame_mean", 1, t=t)
    whole_numbers("frame_mean", l=l)
    idx = torch.arange(t * l).view(t, l).T.reshape(-1)
    return csr("frame_mean", torch.arange(l + 1) * t, idx, torch.full((t * l,), 1.0 / t), (t * l,))


def pair_mean(t: int, l: int) -> RearrangePlan:  # noqa: E741
    """BT-Adapter above 64 frames: means of adjacent frames, (b t*l c) -> (b t/2*l c)."""
    whole_numbers("pair_mean", t=t, l=l)
    require(t % 2 == 0, "pair_mean", "t", "be even", t)
    idx = torch.arange(t * l).view(t // 2, 2, l).transpose(1, 2).reshape(-1)
    return csr("pair_mean", torch.arange(t // 2 * l + 1) * 2, idx, torch.full((t * l,), 0.5), (t * l,))


def newline(t: int, h: int, w: int, *, mode: str = "grid") -> RearrangePlan:
    """LLaVA newline tokens, the plan's one fill vector: after every row ("grid"), after every frame ("frame"), once at
    the end ("one_token"), or nowhere ("none")."""
    whole_numbers("newline", t=t, h=h, w=w)
    n = t * h * w
    shapes = {"grid": (t * h, w), "frame": (t, h * w), "one_token": (1, n), "none": (1, n)}
    require(mode in shapes, "newline", "mode", f"be one of {', '.join(shapes)}", repr(mode))
    idx = torch.arange(n, dtype=torch.int32).view(shapes[mode])
    if mode == "none":
        return gather("newline", idx.reshape(-1), (n,))
    idx = torch.cat([idx, idx.new_full((idx.shape[0], 1), n)], 1)
    return gather("newline", idx.reshape(-1), (n,), fills=1)


def pos_embed(
    table: tuple[int, int],
    grid: tuple[int, int],
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    merge: int = 1,
    t: int = 1,
) -> RearrangePlan:
    """A learned position table of another size: (1 table_h*table_w c) -> (1 t*h*w c), 4 or 16 taps per token.

    align_corners=True is Qwen3-VL's linspace, False is torch's interpolate; merge > 1 bakes in `merge_order`.
    """
    require(mode in ("bilinear", "bicubic"), "pos_embed", "mode", "be 'bilinear' or 'bicubic'", repr(mode))
    whole_numbers("pos_embed", 1, table_h=table[0], table_w=table[1], h=grid[0], w=grid[1], merge=merge, t=t)
    taps = _linear if mode == "bilinear" else _cubic
    rows, columns = taps(table[0], grid[0], align_corners), taps(table[1], grid[1], align_corners)
    plan = _product("pos_embed", (1, *table), (_blocks(1, 1, False), rows, columns), "sum")
    n = grid[0] * grid[1]
    order = merge_order(1, *grid, merge).index[0] if merge > 1 else torch.arange(n, dtype=torch.int32)
    return plan.compose(gather("merge", order.repeat(t), (n,)))
