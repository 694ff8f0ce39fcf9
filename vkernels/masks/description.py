"""A mask as a device reads it: a small table of its segments and relations, and the tensors the user gave. The table
holds the description only; values (kept tokens, ids) stay where they are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vkernels.masks.attributes import Blocks, Ids, Position, Relation, Segment, upload
from vkernels.masks.roles import Roles, box_columns, roles

FIELDS = 8  # int64 of a segment's row, and of a relation's
ARITHMETIC, BLOCKS, IDS = 0, 1, 2  # where a value comes from
INTERVAL, CLASS, BOX, LEADER = 0, 1, 2, 3  # what a relation does
LARGEST = 2**62  # codes are int64


@dataclass(frozen=True)
class Description:
    """What the kernels of `vkernels.masks.triton` need to know of a mask, all of it on the host but for the ids."""

    segments: list[int]  # per segment: begin, globals, tokens, first code, codes, first relation, relations, 0
    relations: list[int]  # per relation: kind, role, size, lo, hi, inner | first end | first id, row stride, column
    ends: list[int]  # 0 and the end of every block, for each relation on blocks
    ids: list[Ids]
    bounds: tuple[tuple[int, int], ...]  # of the box
    codes: int  # one past the last code: where dropped tokens sort
    most: int  # relations of the segment that has most of them
    in_order: bool
    plain: bool  # no ranges are needed
    globals: bool

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(segments, relations, ends, ids) on `device`, in two copies that nobody waits for."""
        relations, ends = self.relations or [0] * FIELDS, self.ends or [0]
        table = upload(torch.tensor(self.segments + relations + ends, dtype=torch.int64), device)
        segments, relations_, ends_ = table.split([len(self.segments), len(relations), len(ends)])
        if not self.ids:
            ids = torch.zeros(1, dtype=torch.int32, device=device)
        else:
            ids = torch.cat([upload(each.keys, device).reshape(-1) for each in self.ids])
        return segments.view(-1, FIELDS), relations_.view(-1, FIELDS), ends_, ids


def describe(segments: list[Segment]) -> Description:
    """`segments` without the empty ones."""
    parts = [roles(segment) for segment in segments]
    columns, places = box_columns(parts)
    table: list[int] = []
    rows: list[int] = []
    ends: list[int] = []
    ids: list[Ids] = []
    starts: dict[int, int] = {}  # id() of an Ids -> its first element
    known: dict[Blocks, int] = {}
    begin = base = most = size_of_ids = 0

    def source(relation: Relation) -> tuple[int, int, int]:
        """(kind, at, row stride)"""
        nonlocal size_of_ids
        attribute = relation.attribute
        if isinstance(attribute, Ids):
            if id(attribute) not in starts:
                starts[id(attribute)] = size_of_ids
                ids.append(attribute)
                size_of_ids += attribute.keys.numel()
            return IDS, starts[id(attribute)], attribute.tokens if attribute.keys.shape[0] > 1 else 0
        if isinstance(attribute, Blocks):
            if attribute not in known:
                known[attribute] = len(ends)
                ends.extend((0, *accumulate(attribute.lengths)))
            return BLOCKS, known[attribute], 0
        return ARITHMETIC, 1 if isinstance(attribute, Position) else max(attribute.inner, 1), 0

    for segment, part, used in zip(segments, parts, places, strict=True):
        first = len(rows) // FIELDS
        does = [(INTERVAL, r, 0) for r in part.intervals] + [(LEADER, r, 0) for r in (part.leader,) if r is not None]
        does += [(CLASS, r, 0) for r in part.classes]
        does += [(BOX, r, column) for r, column in zip(part.box, used, strict=True)]
        for role, relation, column in does:
            kind, at, stride = source(relation)
            rows += [kind, role, relation.attribute.size, relation.lo, relation.hi, at, stride, column]
        codes = _codes(segment, part)
        table += [begin, segment.globals, segment.tokens, base, codes, first, len(does), 0]
        begin, base, most = begin + segment.length, base + codes, max(most, len(does))
    return Description(
        segments=table,
        relations=rows,
        ends=ends,
        ids=ids,
        bounds=tuple(columns),
        codes=base,
        most=most,
        in_order=all(part.in_order for part in parts),
        plain=len(parts) <= 1 and all(part.plain for part in parts),
        globals=any(segment.globals for segment in segments),
    )


def too_wide(segments: list[Segment]) -> bool:
    """Whether the codes of these segments leave int64: several ids crossed over very many tokens."""
    return sum([_codes(segment, roles(segment)) for segment in segments]) >= LARGEST


def _codes(segment: Segment, part: Roles) -> int:
    cells = 1
    for relation in part.classes:
        cells *= max(relation.attribute.size, 1)
    return segment.globals + cells * segment.tokens
