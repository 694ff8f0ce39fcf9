"""Plans that put video rows among text rows: one pass from projector output to LLM input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vkernels.check import refusal, require
from vkernels.rearrangement.layout import as_rows
from vkernels.rearrangement.plan import RearrangePlan, csr, gather

Part = tuple[str, int]


def rows_of(mask: torch.Tensor, n: int) -> torch.Tensor:
    """Row numbers of the first n True entries of a bool mask (s) or (b s): int32, -1 where there are fewer. No host
    sync. `rearrange(..., out=embeds, rows=rows_of(is_video, n))` is what masked_scatter does."""
    if mask.dtype != torch.bool or mask.dim() not in (1, 2):
        raise ValueError(
            refusal("rows_of", "mask", "be bool of shape (s) or (b s)", f"{mask.dtype} {tuple(mask.shape)}")
        )
    order = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices[..., :n]
    rows = torch.where(mask.gather(-1, order), order, -1).to(torch.int32)
    return torch.nn.functional.pad(rows, (0, n - rows.shape[-1]), value=-1)


def scatter_rows(rows: torch.Tensor, s: int) -> RearrangePlan:
    """Row r goes to rows[r] of s; every other row is zero. rows (n) or (b n)."""
    return gather("scatter", rows, (s,)).inverse


def assemble(
    layout: torch.Tensor | Sequence[Part], *, text: int | None = None, video: RearrangePlan | int | None = None
) -> RearrangePlan:
    """Text embeddings and video rows to the LLM's input: sources (text, video input) -> (b s c).

    Args:
        layout: a bool mask (s) or (b s), True where a video row goes: the text source then has s rows too (those at
                the placeholders are not read). Or parts in order, [("text", 12), ("video", 2048), ("text", 30)]: the
                text source has just the text rows
        text:   rows of the text source, where it has more than the layout uses
        video:  how many video rows there are, or the plan that makes them (pool, newline, interleave_clips, ..),
                which is then done in the same pass
    Returns:
        the plan; `plan.apply_index(labels, fill=-100)` and `apply_index(positions)` follow the tokens.
    """
    if isinstance(layout, torch.Tensor):
        if layout.dtype != torch.bool or layout.dim() not in (1, 2):
            got = f"{layout.dtype} {tuple(layout.shape)}"
            raise ValueError(refusal("assemble", "layout", "be bool of shape (s) or (b s), or a list of parts", got))
        mask = layout if layout.dim() == 2 else layout[None]
        n_text = mask.shape[1]
        own = torch.arange(n_text, device=mask.device)
        used = mask.sum(1)
        n_video = int(used[0]) if len(used) else 0
        require(bool((used == n_video).all()), "assemble", "layout", "hold equally many video rows", used.tolist())
        idx = torch.where(mask, n_text + mask.long().cumsum(1) - 1, own)
    else:
        counts = {"text": 0, "video": 0}
        pieces = []
        for kind, size in layout:
            require(kind in counts, "assemble", "layout", "name parts 'text' or 'video'", repr(kind))
            require(isinstance(size, int) and size >= 0, "assemble", "layout", "give every part a size", size)
            pieces.append((kind, torch.arange(counts[kind], counts[kind] + size)))
            counts[kind] += size
        n_text, n_video = counts["text"], counts["video"]
        if text is not None:
            require(text >= n_text, "assemble", "text", f"be at least the {n_text} text rows of the layout", text)
            n_text = text
        idx = torch.cat([torch.zeros(0, dtype=torch.int64)] + [r if k == "text" else n_text + r for k, r in pieces])
    if isinstance(video, RearrangePlan):
        video = as_rows(video, 0 if video.is_affine else video.n_in)
        require(video.n_out == n_video, "assemble", "video", f"make the {n_video} rows of the layout", video.n_out)
        return _after(n_text, video, idx)
    if video is not None:
        require(video >= n_video, "assemble", "video", f"be at least the {n_video} rows of the layout", video)
        n_video = video
    return gather("assemble", idx, (n_text, n_video))


def _after(n_text: int, video: RearrangePlan, idx: torch.Tensor) -> RearrangePlan:
    """Rows of the text source and of a video plan's result, picked by idx."""
    require(
        len(video.sources) == 1 and video.reduce == "sum", "assemble", "video", "be a sum over one source", repr(video)
    )
    require(video.out_groups == 1 and not video.whole, "assemble", "video", "give one sequence per sample", repr(video))
    p = video.samples
    own = torch.arange(n_text, dtype=torch.int32).expand(p, -1)
    if video.is_gather:
        moved = torch.where(video.index < 0, video.index, video.index + n_text)
        both = gather("assemble", torch.cat([own, moved], 1), (n_text, video.n_in), fills=video.fills)
    else:
        ptr = video.ptr
        if ptr is None:
            raise ValueError(refusal("assemble", "video", "be a gather or have ptr", repr(video)))
        ptr = torch.cat([own, ptr + n_text], 1)
        weight = None
        if video.weight is not None:
            weight = torch.cat([torch.ones(p, n_text), video.weight], 1)
        both = csr(
            "assemble", ptr, torch.cat([own, video.index + n_text], 1), weight, (n_text, video.n_in), fills=video.fills
        )
    return both.compose(gather("assemble", idx, (both.n_out,)))


def pack(layouts: Sequence[Sequence[Part]]) -> RearrangePlan:
    """Several samples packed into one sequence: sources (all text rows c) and (all video rows c), sample after sample,
    to (total c). Carries `cu_seqlens`; `positions` of the samples are `arange` minus their start."""
    parts = [part for layout in layouts for part in layout]
    plan = assemble(parts)
    lengths = torch.tensor([0] + [sum(size for _, size in layout) for layout in layouts])
    return gather("pack", plan.idx, plan.sources, cu_seqlens=lengths.cumsum(0).to(torch.int32))
