"""Plans that change the order of tokens and nothing else: axis patterns, sequences of attention, clips, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vkernels.check import refusal, require
from vkernels.rearrangement.pattern import Pattern
from vkernels.rearrangement.plan import RearrangePlan, csr, gather


def whole_numbers(op: str, lowest: int = 0, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(refusal(op, name, "be an int", type(size).__name__))
        require(size >= lowest, op, name, f"be at least {lowest}", size)


def from_einops(pattern: str, shape: Sequence[int] | None = None, **sizes: int) -> RearrangePlan:
    """Any permutation, split and merge of axes in einops' notation; axes that only the right side names are repeated.

    Sizes that a tensor determines may be left out; they are learned when the plan meets it, or from `shape`. No index
    memory. `from_einops("b t (h w) c -> (b h w) t c", h=16)`.
    """
    parsed = Pattern.parse(pattern, sizes)
    if shape is not None:
        parsed = Pattern(parsed.ins, parsed.outs, tuple(sorted(parsed.learn(tuple(shape)).items())))
    return RearrangePlan("from_einops", pattern=parsed)


def _affine(name: str, pattern: str, **sizes: int) -> RearrangePlan:
    whole_numbers(name, **sizes)
    return RearrangePlan(name, pattern=Pattern.parse(pattern, sizes))


def frames(t: int) -> RearrangePlan:
    """Frames of a batch to one sequence per video: (b*t l c) -> (b t*l c). `.inverse` takes them apart."""
    return _affine("frames", "(b t) l c -> b (t l) c", t=t)


def _grid_index(t: int, l: int, layout: str, cls: int) -> torch.Tensor:  # noqa: E741
    """Row of patch (t, l), as t x l."""
    require(layout in ("t l", "l t"), "rearrange", "layout", "be 't l' or 'l t'", repr(layout))
    index = torch.arange(t * l, dtype=torch.int32) + cls
    return index.view(t, l) if layout == "t l" else index.view(l, t).T


def temporal(t: int, l: int, *, layout: str = "t l", cls: int = 0) -> RearrangePlan:  # noqa: E741
    """One sequence of t frames per patch: (b cls+t*l c) -> (b*l t c). The first `cls` tokens stay out."""
    whole_numbers("temporal", t=t, l=l, cls=cls)
    idx = _grid_index(t, l, layout, cls).T.reshape(-1)
    return gather("temporal", idx, (t * l + cls,), out_groups=l)


def temporal_back(t: int, l: int, *, layout: str = "t l", cls: int = 0) -> RearrangePlan:  # noqa: E741
    """The way back of `temporal`: (b*l t c) -> (b cls+t*l c). With `cls` the tokens that stayed out come from a second
    source (b cls c)."""
    whole_numbers("temporal_back", t=t, l=l, cls=cls)
    back = temporal(t, l, layout=layout).inverse.index[0]
    idx = torch.cat([t * l + torch.arange(cls, dtype=torch.int32), back])
    sources = (t * l, cls) if cls else (t * l,)
    return gather("temporal_back", idx, sources, in_groups=l)


def spatial(t: int, l: int, *, layout: str = "t l", cls: str | None = None) -> RearrangePlan:  # noqa: E741
    """One sequence of patches per frame: (b t*l c) -> (b*t l c). With cls="replicate" the input starts with a CLS token
    and every frame gets a copy of it first: (b 1+t*l c) -> (b*t 1+l c)."""
    whole_numbers("spatial", t=t, l=l)
    require(cls in (None, "replicate"), "spatial", "cls", "be 'replicate' or None", repr(cls))
    lead = 0 if cls is None else 1
    idx = _grid_index(t, l, layout, lead)
    if lead:
        idx = torch.cat([idx.new_zeros(t, 1), idx], 1)
    return gather("spatial", idx.reshape(-1), (t * l + lead,), out_groups=t)


def spatial_back(t: int, l: int, *, layout: str = "t l", cls: str | None = None) -> RearrangePlan:  # noqa: E741
    """The way back of `spatial`. With cls="mean" the CLS token is the mean of its t copies:
    (b*t 1+l c) -> (b 1+t*l c)."""
    require(cls in (None, "mean"), "spatial_back", "cls", "be 'mean' or None", repr(cls))
    if cls is None:
        plan = spatial(t, l, layout=layout).inverse
        return RearrangePlan("spatial_back", sources=plan.sources, n_out=plan.n_out, idx=plan.idx, in_groups=t)
    whole_numbers("spatial_back", 1, t=t)
    back = spatial(t, l, layout=layout).inverse.index[0]
    patches = back // max(l, 1) * (l + 1) + 1 + back % max(l, 1)
    copies = torch.arange(t, dtype=torch.int32) * (l + 1)
    ptr = torch.cat([torch.tensor([0]), t + torch.arange(t * l + 1)])
    weight = torch.cat([torch.full((t,), 1.0 / t), torch.ones(t * l)])
    return csr("spatial_back", ptr, torch.cat([copies, patches]), weight, (t * (l + 1),), in_groups=t)


def interleave_clips(m: int, n: int, k: int, *, frames: int | None = None) -> RearrangePlan:
    """INTP: sub-clip j of m holds frames j, j + m, ..; put the encoder's output back into time order,
    Z[(i*m + j)*k + p] = V[j, i, p]: (b*m n*k c) or (b m*n*k c) -> (b frames*k c).

    `frames` below m*n drops the padding frames at the end (see `deal_clips`).
    """
    frames = m * n if frames is None else frames
    whole_numbers("interleave_clips", m=m, n=n, k=k, frames=frames)
    require(frames <= m * n, "interleave_clips", "frames", f"be at most m*n={m * n}", frames)
    rows = torch.arange(m * n * k, dtype=torch.int32).view(m, n, k).transpose(0, 1).reshape(m * n, k)
    return gather("interleave_clips", rows[:frames].reshape(-1), (m * n * k,), in_groups=max(m, 1))


def deal_clips(m: int, n: int, k: int, *, frames: int | None = None) -> RearrangePlan:
    """The way in of `interleave_clips`: (b frames*k c) -> (b*m n*k c). A last sub-clip that is short repeats the last
    frame."""
    frames = m * n if frames is None else frames
    whole_numbers("deal_clips", m=m, n=n, k=k, frames=frames)
    require(0 < frames <= m * n, "deal_clips", "frames", f"be 1 to m*n={m * n}", frames)
    frame = (torch.arange(m)[:, None] + m * torch.arange(n)[None]).clamp(max=frames - 1)
    idx = frame[..., None] * k + torch.arange(k)
    return gather("deal_clips", idx.reshape(-1), (frames * k,), out_groups=max(m, 1))


def window(t: int, h: int, w: int, size: int, *, unit: int = 1) -> RearrangePlan:
    """Qwen2.5-VL windows: the (h, w) grid of every frame in windows of size x size, those at the border smaller.

    `unit` consecutive tokens move together (merge x merge patches of one merged token). Carries the windows'
    `cu_seqlens` (tokens). `.inverse` puts the tokens back.
    """
    whole_numbers("window", t=t, h=h, w=w)
    whole_numbers("window", 1, size=size, unit=unit)
    rows = -(-h // size), -(-w // size)
    padded = torch.full((t, rows[0] * size, rows[1] * size), -1, dtype=torch.int32)
    padded[:, :h, :w] = torch.arange(t * h * w, dtype=torch.int32).view(t, h, w)
    tiles = padded.view(t, rows[0], size, rows[1], size).transpose(2, 3).reshape(-1, size * size)
    lengths = (tiles >= 0).sum(1)
    cu_seqlens = torch.nn.functional.pad((lengths * unit).cumsum(0), (1, 0)).to(torch.int32)
    idx = tiles[tiles >= 0][:, None] * unit + torch.arange(unit, dtype=torch.int32)
    return gather("window", idx.reshape(-1), (t * h * w * unit,), cu_seqlens=cu_seqlens)


def merge_order(t: int, h: int, w: int, merge: int = 2) -> RearrangePlan:
    """Qwen-VL: raster patches to blocks of merge x merge neighbours, so that a view concatenates them."""
    whole_numbers("merge_order", t=t, h=h, w=w)
    whole_numbers("merge_order", 1, merge=merge)
    for name, size in (("h", h), ("w", w)):
        require(size % merge == 0, "merge_order", name, f"be a multiple of merge={merge}", size)
    order = torch.arange(t * h * w, dtype=torch.int32).view(t, h // merge, merge, w // merge, merge)
    return gather("merge_order", order.transpose(2, 3).reshape(-1), (t * h * w,))


def pixel_unshuffle(h: int, w: int, r: int = 2, *, channels: str = "last") -> RearrangePlan:
    """Space to depth: (b h*w c) -> (b h/r*w/r r*r*c). channels="last" keeps the c of a pixel together (InternVL),
    "first" is torch's order, c outermost. `.inverse` is `pixel_shuffle`."""
    whole_numbers("pixel_unshuffle", 1, r=r)
    for name, size in (("h", h), ("w", w)):
        whole_numbers("pixel_unshuffle", **{name: size})
        require(size % r == 0, "pixel_unshuffle", name, f"be a multiple of r={r}", size)
    require(channels in ("last", "first"), "pixel_unshuffle", "channels", "be 'last' or 'first'", repr(channels))
    packed = "(p q c)" if channels == "last" else "(c p q)"
    return _affine("pixel_unshuffle", f"b (h p w q) c -> b (h w) {packed}", h=h // r, w=w // r, p=r, q=r)


def pixel_shuffle(h: int, w: int, r: int = 2, *, channels: str = "last") -> RearrangePlan:
    """Depth to space, the inverse of `pixel_unshuffle`: (b h*w r*r*c) -> (b h*r*w*r c)."""
    whole_numbers("pixel_shuffle", h=h, w=w)
    return pixel_unshuffle(h * r, w * r, r, channels=channels).inverse


def crop(h: int, w: int, *, top: int, left: int, height: int, width: int, t: int = 1) -> RearrangePlan:
    """A rectangle of every frame (LLaVA-NeXT's unpadding of any-resolution images)."""
    whole_numbers("crop", h=h, w=w, top=top, left=left, height=height, width=width, t=t)
    require(top + height <= h, "crop", "top", f"leave {height} of {h} rows", top)
    require(left + width <= w, "crop", "left", f"leave {width} of {w} columns", left)
    grid = torch.arange(t * h * w, dtype=torch.int32).view(t, h, w)
    return gather("crop", grid[:, top : top + height, left : left + width].reshape(-1), (t * h * w,))


def tiles_to_canvas(rows: int, columns: int, h: int, w: int) -> RearrangePlan:
    """rows x columns tiles of h x w tokens to one raster: (b rows*columns*h*w c) -> (b rows*h*columns*w c)."""
    return _affine("tiles_to_canvas", "b (r q h w) c -> b (r h q w) c", r=rows, q=columns, h=h, w=w)


def as_rows(plan: Any, n: int) -> RearrangePlan:
    """`plan` as a plan of rows over n input rows; an affine one must be (b s c) -> (b s' c)."""
    if not plan.is_affine:
        return plan
    first, last = plan.pattern.ins, plan.pattern.outs
    require(
        len(first) == len(last) == 3 and first[0] == last[0] and len(first[0]) == 1,
        "assemble", "video", "keep the batch axis apart", repr(plan),
    )  # fmt: skip
    rows = plan.rows((1, n, 1))
    return RearrangePlan(plan.name, sources=rows.sources, n_out=rows.n_out, idx=rows.idx)
