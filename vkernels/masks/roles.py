"""What each relation of a segment does in a plan. Decided by the mask's description, never by a token's value, so that
every lowering, on the host or on a device, has the same ranges, row maps and box."""

from __future__ import annotations

from dataclasses import dataclass

from vkernels.masks.attributes import Ids, Relation, Segment


@dataclass(frozen=True)
class Roles:
    """Relations of one segment by what they do; trivial ones do nothing."""

    intervals: list[Relation]  # an interval of positions each: they intersect
    leader: Relation | None  # its values order the tokens, where positions cannot
    classes: list[Relation]  # `same` relations that put tokens into classes
    box: list[Relation]  # what is left for the predicate

    @property
    def in_order(self) -> bool:
        """Whether tokens stay where they are."""
        return not self.classes and self.leader is None

    @property
    def plain(self) -> bool:
        """Whether every token sees every token."""
        return self.in_order and not self.intervals and not self.box


def roles(segment: Segment) -> Roles:
    relations = [relation for relation in segment.relations if not relation.trivial]
    steady = [r for r in relations if r.attribute.monotone]
    loose = [r for r in relations if not r.attribute.monotone]
    classes = [r for r in loose if r.same]
    box = [r for r in loose if not r.same]
    leader = next((r for r in box if isinstance(r.attribute, Ids)), box[0] if box and not steady else None)
    if leader is None:
        return Roles(steady, None, classes, box)
    box = [r for r in box if r is not leader] + [r for r in steady if not r.same]
    return Roles([], leader, classes + [r for r in steady if r.same], box)


def box_columns(parts: list[Roles]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The bounds of the box's columns, and for each part its relations' columns: equal bounds share one."""
    columns: list[tuple[int, int]] = []
    places: list[list[int]] = []
    for part in parts:
        used: list[int] = []
        for relation in part.box:
            bounds = (relation.lo, relation.hi)
            free = [i for i, known in enumerate(columns) if known == bounds and i not in used]
            if not free:
                columns.append(bounds)
            used.append(free[0] if free else len(columns) - 1)
        places.append(used)
    return columns, places
