"""divided_attention: the public door."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vkernels.check import bind, require, same_dtype
from vkernels.dispatch import Backend, at_most, choose, like
from vkernels.library import cpu_why_not, cuda_why_not, op, shared_why_not, triton_why_not
from vkernels.masks.grid import Grid
from vkernels.ops.apply_rope import apply_rope
from vkernels.ops.apply_rope.api import canonical_positions
from vkernels.ops.divided_attention import reference, torch_op
from vkernels.remember import remembered
from vkernels.rope import RopeSpec

AXES = ("temporal", "spatial")
ORDERS = ("frame", "patch")
NAME = "divided_attention"


class Call(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    t: int
    l: int  # noqa: E741  (the axis letter of patches per frame)
    axis: str
    cls: int
    order: str
    scale: float
    frames_per_group: int
    layout: list[int]  # as the operators take what of this is a number
    doors: dict[str, Any] | None = None
    rope: Any = None  # (spec, positions)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    *,
    axis: str = "temporal",
    cls: int = 0,
    order: str = "frame",
    scale: float | None = None,
    frames_per_group: int | None = None,
    rope: Any = None,
) -> Call:
    sizes = bind(NAME, ("q", q, "b s n d"), ("k", k, "b s m d"), ("v", v, "b s m d"))
    same_dtype(NAME, ("q", q), ("k", k), ("v", v))
    require(isinstance(grid, Grid), NAME, "grid", "be a Grid(t, h, w)", type(grid).__name__, TypeError)
    require(axis in AXES, NAME, "axis", f"be one of {', '.join(AXES)}", repr(axis))
    require(order in ORDERS, NAME, "order", f"be one of {', '.join(ORDERS)}", repr(order))
    require(cls in (0, 1), NAME, "cls", "be 0 or 1", repr(cls))
    n, m, s = sizes["n"], sizes["m"], sizes["s"]
    require(m >= 1 and n >= m and n % m == 0, NAME, "q", "have a multiple of the heads of k", f"n={n} m={m}")
    want = cls + grid.tokens
    require(s == want, NAME, "grid", f"cover the tokens (cls + t*h*w = {want} of them)", f"s={s} for {grid}")
    frames = frames_per_group
    if frames is None:
        frames = grid.t if axis == "temporal" and grid.t > 0 else 1
    whole = isinstance(frames, int) and not isinstance(frames, bool) and frames >= 1
    require(whole and grid.t % frames == 0, NAME, "frames_per_group", f"divide the {grid.t} frames", repr(frames))
    scale = float(scale) if scale is not None else max(sizes["d"], 1) ** -0.5
    layout = [grid.t, grid.h * grid.w, int(cls), int(axis == "spatial"), int(order == "patch"), frames]
    call = Call(q, k, v, grid.t, grid.h * grid.w, axis, int(cls), order, scale, frames, layout, rope=rope)
    if rope is not None:
        _check_rope(call)
    return call


def _check_rope(c: Call) -> None:
    pair = isinstance(c.rope, tuple) and len(c.rope) == 2
    require(pair, NAME, "rope", "be a pair (spec, positions)", type(c.rope).__name__, TypeError)
    spec, pos = c.rope
    require(isinstance(spec, RopeSpec), NAME, "rope", "begin with a RopeSpec", type(spec).__name__, TypeError)
    tensor = isinstance(pos, torch.Tensor)
    require(tensor, NAME, "rope", "end with a tensor of positions", type(pos).__name__, TypeError)
    require(pos.device == c.q.device, NAME, "rope", f"be on the device of q ({c.q.device})", pos.device, TypeError)
    count, things = (c.t, "frames") if c.axis == "temporal" else (c.l, "patches of a frame")
    good = pos.dim() >= 1 and pos.shape[-1] == count
    require(good, NAME, "rope", f"have a position for each of the {count} {things}", tuple(pos.shape))
    _positions(c)


@remembered
def _decide(q, k, v, grid, axis, cls, order, scale, frames_per_group, rope, backend) -> tuple[Backend, tuple[Any, ...]]:
    """(backend, all of a Call but its tensors)."""
    options = {"axis": axis, "cls": cls, "order": order, "scale": scale, "frames_per_group": frames_per_group}
    call = prepare(q, k, v, grid, **options, rope=rope)
    return choose(NAME, BACKENDS, backend, call), (*call[3:-2], {})


def divided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid,
    *,
    axis: str = "temporal",
    cls: int = 0,
    order: str = "frame",
    scale: float | None = None,
    frames_per_group: int | None = None,
    rope: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend over time at each place, or over space in each frame, with one CLS token shared by all frames.

    Every group of tokens is a softmax attention of its own: o = softmax(q k^T · scale) v.
    axis="temporal": a group is the frames of one patch position. A CLS token belongs to no group: it bypasses the
    layer, its output row and its gradients are 0.
    axis="spatial": a group is the patches of one frame, with the CLS token, if any, at its head. The output of the CLS
    is the mean over the groups of its t separate softmaxes, which is not one softmax over all tokens; its q, k and v
    are read once, never repeated.

    Args:
        q:      queries (b s n d), any strides but the last: slices of a packed qkv cost nothing
        k, v:   keys and values (b s m d), n a multiple of m
        grid:   Grid(t, h, w) of the tokens after the CLS: s = cls + t·l, with l = h·w patches per frame
        axis:   "temporal" or "spatial"
        cls:    1 if token 0 is a CLS token of the whole video, 0 if there is none
        order:  "frame": tokens are ordered (t l), frame-major; "patch": (l t), patch-major (BT-Adapter)
        scale:  score factor; None means d ** -0.5
        frames_per_group: frames that attend together. temporal: that many consecutive frames, None means all t.
            spatial: that many frames, t / frames_per_group apart, None means 1. With t=64 tokens in time and
            frames_per_group 32 (temporal) and 2 (spatial) these are the groups BT-Adapter's chat model forms.
        rope:   (spec, positions): q and k are rotated first, as by apply_rope. Positions are those of what attends
            together. temporal: of the t frames, the same at every place, [t], [axes, t] or [axes, b, t] (one axis: also
            [b, t]). spatial: of the l = h·w patches of a frame, in the order of its rows, the same in every frame. The
            CLS stands at position 0: it is not turned (a scale of the spec is its, too).
        backend: "cpu", "cuda", "triton", "reference"; None takes the first that can run
    Returns:
        o (b s n d), the dtype of q; computed in float32
    Raises:
        ShapeError, ValueError, TypeError, NoBackend
    Gradients: q, k, v.   Deterministic: yes.
    Example:
        >>> qkv = torch.randn(2, 1 + 8 * 16 * 16, 3, 12, 64)
        >>> q, k, v = qkv.unbind(2)
        >>> vkernels.divided_attention(q, k, v, vkernels.Grid(8, 16, 16), axis="spatial", cls=1).shape
        torch.Size([2, 2049, 12, 64])
    Source: TimeSformer, arXiv:2102.05095 (divided space-time attention); BT-Adapter, arXiv:2309.15785 (shared CLS).
    """
    chosen, rest = _decide(q, k, v, grid, axis, cls, order, scale, frames_per_group, rope, backend)
    return chosen.run(Call(q, k, v, *(*rest, rope)))


def _positions(c: Call) -> torch.Tensor:
    """Of frames or of patches: [axes, b|1, t or l]."""
    spec, pos = c.rope
    return canonical_positions(NAME, spec, pos, c.q.shape[0], c.t if c.axis == "temporal" else c.l)


def _positions_of_tokens(c: Call) -> torch.Tensor:
    """[axes, b|1, s]."""
    pos = _positions(c)
    pos = pos[..., :, None] if c.axis == "temporal" else pos[..., None, :]
    pos = pos.expand(*pos.shape[:2], c.t, c.l)
    if c.order == "patch":
        pos = pos.transpose(-1, -2)
    return torch.nn.functional.pad(pos.flatten(-2), (c.cls, 0))


def _turned(c: Call, backend: str) -> Call:
    """The same call on q and k that are rotated already."""
    if c.rope is None:
        return c
    q, k = apply_rope(c.q, c.k, c.rope[0], _positions_of_tokens(c), backend=backend)
    return c._replace(q=q, k=k, rope=None)


def composed_because(c: Call) -> str | None:
    """None where the CUDA kernels rotate q and k themselves, else the sentence that says why they do not."""
    spec, _ = c.rope
    if c.axis != "temporal":
        return "the axis is spatial, they rotate along time"
    if c.frames_per_group > torch_op.TURNED:
        return f"{c.frames_per_group} frames attend together, they rotate up to {torch_op.TURNED}"
    if 2 * spec.pairs != c.q.shape[3] or len(spec.axis_rows) > 1:
        return "they rotate whole heads, all alike"
    if spec.layout not in ("half", "pair"):
        return f"pairs lie as {spec.layout!r}, they rotate halves and neighbours"
    return None


def _run(c: Call, backend: str) -> torch.Tensor:
    c = _turned(c, backend)
    return op("divided_attention_fwd", backend, c.doors)(c.q, c.k, c.v, c.scale, c.layout)


def _run_cuda(c: Call) -> torch.Tensor:
    if c.rope is None or composed_because(c) is not None:
        return _run(c, "cuda")
    spec = c.rope[0]
    turn = torch_op.angles_of(spec, _positions(c)), spec.layout == "pair"
    return op("divided_attention_fwd", "cuda", c.doors)(c.q, c.k, c.v, c.scale, c.layout, *turn)


def _run_reference(c: Call) -> torch.Tensor:
    c = _turned(c, "reference")
    return reference.divided_attention(c.q, c.k, c.v, c.t, c.l, c.axis, c.cls, c.order, c.scale, c.frames_per_group)


LARGEST_BLOCK = 115712  # bytes of shared memory, in the tiled backward of the CUDA kernels for heads above 96


def _cuda_why_not(c: Call) -> str | None:
    b, s, n, d = c.q.shape
    if (reason := cuda_why_not(c.q)) is not None:
        return reason
    if c.q.dtype == torch.float32:
        return "dtype float32 has no tensor cores to run on"
    if d % 8 or not 8 <= d <= 128:
        return f"head size {d} is not a multiple of 8 up to 128"
    if c.scale <= 0:
        return f"scale {c.scale} is not positive"
    packed = c.axis == "temporal" and c.frames_per_group <= torch_op.PACKED
    if d > 96 and not packed and (reason := shared_why_not(c.q, LARGEST_BLOCK)) is not None:
        return reason
    rows = b * n * (s + c.t * c.l + 1)
    return None if rows < 2**30 else f"b*n*s is {rows}, this backend takes less than 2^30"


def _triton_why_not(c: Call) -> str | None:
    b, _, n, d = c.q.shape
    if (reason := triton_why_not(c.q)) is not None:
        return reason
    if d % 8 or not 8 <= d <= 256:
        return f"head size {d} is not a multiple of 8 up to 256"
    rows = b * n * (c.t + 1) * (c.l + 1)
    return None if rows < 2**30 else f"b*n*(t+1)*(l+1) is {rows}, this backend takes less than 2^30"


def _kind(c: Call) -> tuple[torch.device, str]:
    """The length of a group decides how many share a tile."""
    tokens = c.frames_per_group * (1 if c.axis == "temporal" else c.l)
    return like(c.q, None, c.axis, f"groups <= {at_most(tokens, 16, 128)}")


BACKENDS = (
    Backend("cpu", lambda c: cpu_why_not(c.q), lambda c: _run(c, "cpu")),
    Backend("cuda", _cuda_why_not, _run_cuda, _kind),
    Backend("triton", _triton_why_not, lambda c: _run(c, "triton")),
    Backend("reference", lambda c: None, _run_reference),
)
