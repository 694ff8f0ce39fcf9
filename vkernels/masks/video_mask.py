"""VideoMask: who may see whom, said in terms of the video. A value: frozen, printable, hashable, serialisable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vkernels.check import refusal, require
from vkernels.masks.attributes import Axis, Blocks, Ids, Position, Relation, Segment, within
from vkernels.masks.grid import Grid
from vkernels.masks.plan import INFINITY, MaskPlan
from vkernels.named import Named
from vkernels.remember import Form

if TYPE_CHECKING:
    from vkernels.masks.stats import MaskStats


@dataclass(frozen=True)
class Text:
    """`tokens` text tokens of a span list: causal among themselves."""

    tokens: int

    def __post_init__(self) -> None:
        _whole("Text", "tokens", self.tokens)


@dataclass(frozen=True)
class Video:
    """`t` frames of `h` x `w` tokens of a span list: bidirectional as `within` says."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        Grid(self.t, self.h, self.w)

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w


class VideoMask(Named):
    """Who may see whom. Built by the constructors below; combined with `keep`, `with_globals`, `&` and `pack`.

    A pair is visible when ``keep_k and keep_q and same segment and (global_q or global_k or every relation holds)``, a
    relation being ``lo <= a_k - a_q <= hi`` on frame, row, column, block or position. Two masks are equal when their
    segments, relations and dropped tokens are; hashing and comparing read dropped tokens and ids back to the host,
    planning never does.

    Example:
        >>> grid = vk.Grid(8, 16, 16)
        >>> vk.VideoMask.frame_causal(grid)
        VideoMask.frame_causal(Grid(t=8, h=16, w=16))
    """

    __slots__ = ("__weakref__", "_expression", "_forms", "_plans", "keep_k", "keep_q", "segments")

    segments: tuple[Segment, ...]
    keep_k: Tensor | None  # bool [p, s]; None: every key is kept
    keep_q: Tensor | None
    _expression: str
    _plans: dict[tuple[torch.device, str | None], MaskPlan]
    _forms: dict[torch.device, Form]

    def __init__(
        self,
        segments: tuple[Segment, ...],
        keep_k: Tensor | None = None,
        keep_q: Tensor | None = None,
        expression: str = "VideoMask(...)",
    ):
        for name, value in (
            ("segments", segments),
            ("keep_k", keep_k),
            ("keep_q", keep_q),
            ("_expression", expression),
            ("_plans", {}),
            ("_forms", {}),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"VideoMask: {name} cannot be set, a mask is a value; build another one")

    # ---- constructors

    @classmethod
    def joint(cls, grid: Grid) -> VideoMask:
        """Every token sees every token."""
        _grid("joint", grid)
        return cls((Segment(grid.tokens),), expression=f"VideoMask.joint({grid})")

    @classmethod
    def spatial(cls, grid: Grid) -> VideoMask:
        """Within a frame."""
        _grid("spatial", grid)
        return cls(_segment(grid.tokens, (Axis(grid, 0), 0, 0)), expression=f"VideoMask.spatial({grid})")

    @classmethod
    def temporal(cls, grid: Grid) -> VideoMask:
        """Across frames at the same row and column."""
        _grid("temporal", grid)
        relations = ((Axis(grid, 1), 0, 0), (Axis(grid, 2), 0, 0))
        return cls(_segment(grid.tokens, *relations), expression=f"VideoMask.temporal({grid})")

    @classmethod
    def frame_causal(cls, grid: Grid, window: int | None = None) -> VideoMask:
        """The own frame and earlier ones; with `window` W only the own frame and the W-1 before it."""
        _grid("frame_causal", grid)
        lo = -INFINITY
        if window is not None:
            _whole("frame_causal", "window", window, least=1)
            lo = max(1 - window, -INFINITY)
        note = "" if window is None else f", window={window}"
        return cls(_segment(grid.tokens, (Axis(grid, 0), lo, 0)), expression=f"VideoMask.frame_causal({grid}{note})")

    @classmethod
    def causal(cls, n: int) -> VideoMask:
        """`n` tokens, each seeing itself and earlier ones."""
        _whole("causal", "n", n)
        return cls(_segment(n, (Position(n), -INFINITY, 0)), expression=f"VideoMask.causal({n})")

    @classmethod
    def window(cls, grid: Grid, extent: tuple[int | None, int | None, int | None]) -> VideoMask:
        """A box around the token: at most extent = (t, h, w) frames, rows, columns away either side; None: no limit."""
        _grid("window", grid)
        good = isinstance(extent, (tuple, list)) and len(extent) == 3
        require(good, "window", "extent", "be three sizes (t, h, w)", extent, TypeError)
        relations = []
        for axis, (name, reach) in enumerate(zip("thw", extent, strict=True)):
            if reach is not None:
                _whole("window", name, reach)
                relations.append((Axis(grid, axis), *within(reach, reach)))
        return cls(_segment(grid.tokens, *relations), expression=f"VideoMask.window({grid}, {tuple(extent)})")

    @classmethod
    def spans(cls, spans: Sequence[Text | Video], within: str = "video") -> VideoMask:
        """Text and video in one sequence: bidirectional inside a block, causal across blocks.

        A text token is a block of its own; a video is one block (`within="video"`), a block per frame (`"frame"`), or
        blocks of one token (`"token"`, that is, causal).
        """
        rules = ("video", "frame", "token")
        require(within in rules, "spans", "within", f"be one of {', '.join(rules)}", repr(within))
        lengths: list[int] = []
        for span in spans:
            require(isinstance(span, (Text, Video)), "spans", "spans", "hold Text and Video", span, TypeError)
            if isinstance(span, Text) or within == "token":
                lengths += [1] * span.tokens
            elif within == "frame":
                lengths += [span.h * span.w] * span.t
            else:
                lengths.append(span.tokens)
        blocks = Blocks(tuple(length for length in lengths if length))
        note = f"VideoMask.spans({list(spans)}, within={within!r})"
        return cls(_segment(blocks.tokens, (blocks, -INFINITY, 0)), expression=note)

    @classmethod
    def from_block_ids(cls, ids: Tensor | Sequence[Any]) -> VideoMask:
        """Bidirectional inside a block, causal across: `ids` int [s] or [b, s] names each token's block.

        Blocks are ordered by where they first appear (for non-decreasing ids, their numeric order); a negative id, HF's
        -1 for text in `block_sequence_ids`, is a block of its own.
        """
        ids = torch.as_tensor(ids)
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.numel():
            require(whole, "from_block_ids", "ids", "be integers", ids.dtype, TypeError)
        require(ids.dim() in (1, 2), "from_block_ids", "ids", "have shape (s) or (b s)", tuple(ids.shape))
        table = ids[None] if ids.dim() == 1 else ids
        block = Ids.from_ids(table)
        note = f"VideoMask.from_block_ids(<ids {tuple(ids.shape)}>)"
        return cls(_segment(block.tokens, (block, -INFINITY, 0)), expression=note)

    @classmethod
    def from_cu_seqlens(cls, cu: Tensor | Sequence[int]) -> VideoMask:
        """Sequences laid end to end, [0, n0, n0+n1, ...]; each sees itself only. A device tensor is read back once."""
        if isinstance(cu, Tensor):
            whole = not (cu.is_floating_point() or cu.is_complex() or cu.dtype == torch.bool) and cu.dim() == 1
            require(whole, "from_cu_seqlens", "cu", "be a list of integers", f"{cu.dtype} {tuple(cu.shape)}", TypeError)
            cu = cu.tolist()
        bounds = list(cu)
        whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
        require(whole, "from_cu_seqlens", "cu", "be a list of integers", bounds[:8], TypeError)
        require(bool(bounds) and bounds[0] == 0, "from_cu_seqlens", "cu", "start at 0", bounds[:8])
        lengths = [after - before for before, after in pairwise(bounds)]
        require(all(n >= 0 for n in lengths), "from_cu_seqlens", "cu", "never decrease", bounds[:8])
        blocks = Blocks(tuple(length for length in lengths if length))
        return cls(_segment(blocks.tokens, (blocks, 0, 0)), expression=f"VideoMask.from_cu_seqlens({bounds})")

    @classmethod
    def pack(cls, masks: Sequence[VideoMask]) -> VideoMask:
        """The masks' tokens end to end, none seeing another's."""
        for mask in masks:
            require(isinstance(mask, VideoMask), "pack", "masks", "hold VideoMask", type(mask).__name__, TypeError)
        return cls(
            tuple(segment for mask in masks for segment in mask.segments),
            _joined("pack", [(mask.keep_k, mask.tokens) for mask in masks]),
            _joined("pack", [(mask.keep_q, mask.tokens) for mask in masks]),
            f"VideoMask.pack([{', '.join(map(repr, masks))}])",
        )

    # ---- combinations

    def keep(self, keep: Tensor | Sequence[Any], queries: bool = False) -> VideoMask:
        """Drop tokens: `keep` bool [s] or [b, s]. Dropped tokens are unseen; with `queries` they also see nothing."""
        keep = torch.as_tensor(keep)
        require(keep.dtype == torch.bool or not keep.numel(), "keep", "keep", "be bool", keep.dtype, TypeError)
        good = keep.dim() in (1, 2) and keep.shape[-1] == self.tokens
        require(good, "keep", "keep", f"have shape (s) or (b s) with s={self.tokens}", tuple(keep.shape))
        table = (keep[None] if keep.dim() == 1 else keep).bool().clone()
        note = f"{self!r}.keep(<bool {tuple(keep.shape)}>{', queries=True' if queries else ''})"
        keep_q = _both("keep", self.keep_q, table) if queries else self.keep_q
        return VideoMask(self.segments, _both("keep", self.keep_k, table), keep_q, note)

    def with_globals(self, cls: int = 1) -> VideoMask:
        """`cls` more tokens in front (CLS, registers) that see and are seen by all: s grows. Before `pack`."""
        _whole("with_globals", "cls", cls)
        one = len(self.segments) == 1
        require(one, "with_globals", "mask", "be a single segment (pack afterwards)", f"{len(self.segments)} segments")
        segment = replace(self.segments[0], globals=self.segments[0].globals + cls)
        keeps = [
            None if k is None else torch.nn.functional.pad(k, (cls, 0), value=True) for k in (self.keep_k, self.keep_q)
        ]
        return VideoMask((segment,), keeps[0], keeps[1], f"{self!r}.with_globals(cls={cls})")

    def __and__(self, other: VideoMask) -> VideoMask:
        """Visible in both. Token counts, segments, global tokens and grids must agree."""
        if not isinstance(other, VideoMask):
            return NotImplemented
        require(self.tokens == other.tokens, "&", "masks", "have as many tokens", f"{self.tokens} and {other.tokens}")
        shapes = [[(s.tokens, s.globals) for s in mask.segments] for mask in (self, other)]
        rule = "have the same segments and global tokens (combine before pack and with_globals)"
        require(shapes[0] == shapes[1], "&", "masks", rule, f"(tokens, globals) {shapes[0][:4]} and {shapes[1][:4]}")
        segments = tuple(_merge(a, b) for a, b in zip(self.segments, other.segments, strict=True))
        keep_k, keep_q = _both("&", self.keep_k, other.keep_k), _both("&", self.keep_q, other.keep_q)
        return VideoMask(segments, keep_k, keep_q, f"({self!r} & {other!r})")

    # ---- what it means

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """The law: bool [s, s], or [b, s, s] when the mask differs by sample; rows are queries. O(s^2), for tests."""
        device = torch.device(device or "cpu")
        s, p = self.tokens, self.samples
        visible = torch.zeros((p, s, s), dtype=torch.bool, device=device)
        begin = 0
        for segment in self.segments:
            block = torch.ones((p, segment.length, segment.length), dtype=torch.bool, device=device)
            inner = block[:, segment.globals :, segment.globals :]
            for relation in segment.relations:
                value = relation.attribute.values(device)
                difference = value[:, None, :] - value[:, :, None]
                inner &= (difference >= relation.lo) & (difference <= relation.hi)
            visible[:, begin : begin + segment.length, begin : begin + segment.length] = block
            begin += segment.length
        if self.keep_k is not None:
            visible &= self.keep_k.to(device)[:, None, :]
        if self.keep_q is not None:
            visible &= self.keep_q.to(device)[:, :, None]
        return visible if self.batched else visible[0]

    @property
    def batched(self) -> bool:
        """Whether the mask differs by sample (a batched keep or batched ids): then dense() is [b, s, s]."""
        return self.samples > 1

    @property
    def samples(self) -> int:
        """1, or the batch the mask was given for."""
        sizes = [keep.shape[0] for keep in (self.keep_k, self.keep_q) if keep is not None]
        for segment in self.segments:
            sizes += [r.attribute.keys.shape[0] for r in segment.relations if isinstance(r.attribute, Ids)]
        sizes = [size for size in sizes if size != 1]
        require(len(set(sizes)) <= 1, "VideoMask", "batches", "agree", sizes)
        return sizes[0] if sizes else 1

    def plan(self, device: torch.device | str | None = None, backend: str | None = None) -> MaskPlan:
        """What kernels eat, on `device`; built once per device and kept with the mask. No host synchronisation.

        `backend` is that of `lower_mask`: None takes the kernels on a GPU and torch operations elsewhere.
        """
        from vkernels.masks.lower import lower

        place = device if isinstance(device, torch.device) else torch.device(device or "cpu"), backend
        if place not in self._plans:
            self._plans[place] = lower(self, *place)
        return self._plans[place]

    def form(self, q: Tensor) -> Any:
        """What the mask and its plan for the device of `q` look like, for `remembered` decisions; NotImplemented until
        there is that plan."""
        if torch.compiler.is_compiling() or not isinstance(q, Tensor):
            return NotImplemented
        if (known := self._forms.get(q.device)) is None:
            plan = self._plans.get((q.device, None))
            if plan is None:
                return NotImplemented
            known = self._forms[q.device] = Form(self.tokens, self.samples, plan.form(q))
        return known

    def stats(self, block: int = 128) -> MaskStats:
        """Visible pairs, and tiles of `block` x `block` that are empty, partial or full. Not for hot paths."""
        from vkernels.masks.stats import measure

        return measure(self.plan("cpu"), block)

    def draw(self, width: int = 64) -> str:
        """The mask as text, rows are queries; a cell of several pairs is shaded by the share that is visible."""
        _whole("draw", "width", width, least=1)
        dense = self.dense().float()
        dense = dense if dense.dim() == 3 else dense[None]
        cells = min(width, self.tokens)
        if not cells:
            return ""
        shares = torch.nn.functional.adaptive_avg_pool2d(dense[:1], (cells, cells))[0]
        levels = torch.where(shares >= 1, 4, (shares * 3).ceil()).int().tolist()
        return "\n".join("".join("·░▒▓█"[level] for level in row) for row in levels)

    # ---- a value

    def _key(self) -> tuple[Any, ...]:
        def content(keep: Tensor | None) -> Any:
            return None if keep is None else (tuple(keep.shape), keep.cpu().contiguous().numpy().tobytes())

        return self.segments, content(self.keep_k), content(self.keep_q)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoMask) and (self is other or self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return self._expression

    def __reduce__(self) -> tuple[Any, ...]:
        return VideoMask.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ints and strings, for JSON."""
        from vkernels.masks.serial import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VideoMask:
        """The mask `to_dict` wrote."""
        from vkernels.masks.serial import from_dict

        return from_dict(data)


def _whole(op: str, argument: str, value: Any, least: int = 0) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, op, argument, "be an int", repr(value), TypeError)
    require(value >= least, op, argument, f"be at least {least}", value)


def _grid(op: str, grid: Any) -> None:
    if not isinstance(grid, Grid):
        raise TypeError(refusal(op, "grid", "be a Grid", type(grid).__name__))


def _segment(tokens: int, *relations: Any) -> tuple[Segment, ...]:
    kept = tuple(relation for relation in (Relation(*each) for each in relations) if not relation.trivial)
    return (Segment(tokens, kept),)


def _merge(a: Segment, b: Segment) -> Segment:
    grids = {r.attribute.grid for s in (a, b) for r in s.relations if isinstance(r.attribute, Axis)}
    require(len(grids) <= 1, "&", "masks", "have the same grid", " and ".join(sorted(map(str, grids))))
    bounds = {relation.attribute: (relation.lo, relation.hi) for relation in a.relations}
    for relation in b.relations:
        lo, hi = bounds.get(relation.attribute, (-INFINITY, INFINITY))
        bounds[relation.attribute] = (max(lo, relation.lo), min(hi, relation.hi))
    return replace(a, relations=tuple(Relation(attribute, *pair) for attribute, pair in bounds.items()))


def _both(op: str, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    good = 1 in (a.shape[0], b.shape[0]) or a.shape[0] == b.shape[0]
    require(good, op, "keep", "agree on the batch", f"{a.shape[0]} and {b.shape[0]}")
    return a & b.to(a.device)


def _joined(op: str, parts: list[tuple[Tensor | None, int]]) -> Tensor | None:
    given = [keep for keep, _ in parts if keep is not None]
    if not given:
        return None
    p = max(keep.shape[0] for keep in given)
    good = all(keep.shape[0] in (1, p) for keep in given)
    require(good, op, "keep", "agree on the batch", [keep.shape[0] for keep in given])
    device = given[0].device
    ones = (
        torch.ones((1, n), dtype=torch.bool, device=device) if keep is None else keep.to(device) for keep, n in parts
    )
    return torch.cat([keep.expand(p, -1) for keep in ones], dim=1)
