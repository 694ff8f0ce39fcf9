"""Affine patterns: ``b t (h w) c -> (b h w) t c``, a permutation of strides with no index memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vkernels.check import ShapeError

Groups = tuple[tuple[str, ...], ...]


def _refuse(pattern: str, rule: str, got: object) -> ValueError:
    return ValueError(f"from_einops: pattern '{pattern}' must {rule}, got {got}")


def _parse_side(pattern: str, side: str) -> Groups:
    tokens = re.findall(r"[A-Za-z_]\w*|\(|\)|\S", side)
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for token in tokens:
        if token == "(":
            if inside is not None:
                raise _refuse(pattern, "not nest parentheses", repr(side.strip()))
            inside = []
        elif token == ")":
            if inside is None:
                raise _refuse(pattern, "open a parenthesis before closing it", repr(side.strip()))
            groups.append(tuple(inside))
            inside = None
        elif token == "1" or token.isidentifier():
            names = [] if token == "1" else [token]
            if inside is not None:
                inside += names
            else:
                groups.append(tuple(names))
        else:
            raise _refuse(pattern, "hold axis names, 1 and parentheses only", repr(token))
    if inside is not None:
        raise _refuse(pattern, "close every parenthesis", repr(side.strip()))
    names = [name for group in groups for name in group]
    for name in names:
        if names.count(name) > 1:
            raise _refuse(pattern, "name an axis once per side", repr(name))
    return tuple(groups)


@dataclass(frozen=True)
class Affine:
    """What the native kernel runs: factors in output order, each `step` input positions apart on an input axis."""

    axes: tuple[int, ...]  # input axis of every factor, -1 where the output repeats
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]


@dataclass(frozen=True)
class Pattern:
    """Both sides of ``in -> out`` and the sizes that are known; the rest is learned from the tensor."""

    ins: Groups
    outs: Groups
    sizes: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def parse(text: str, sizes: dict[str, int]) -> Pattern:
        halves = text.split("->")
        if len(halves) != 2:
            raise _refuse(text, "have exactly one '->'", f"{len(halves) - 1} of them")
        ins, outs = (_parse_side(text, half) for half in halves)
        in_names = {n for g in ins for n in g}
        out_names = {n for g in outs for n in g}
        for name, size in sizes.items():
            if name not in in_names | out_names:
                raise _refuse(text, "name every axis that has a size", f"{name}={size}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise _refuse(text, "have sizes that are whole and not negative", f"{name}={size}")
        for name in sorted(in_names - out_names):
            if sizes.get(name) != 1:
                raise _refuse(text, "keep every input axis (use pool or clusters to reduce)", repr(name))
        for name in sorted(out_names - in_names):
            if name not in sizes:
                raise _refuse(text, "be given the size of an axis it repeats", repr(name))
        if len(outs) == 0 or max(len(in_names), len(out_names)) > 8:
            raise _refuse(text, "have 1 to 8 axes", max(len(in_names), len(out_names)))
        return Pattern(ins, outs, tuple(sorted(sizes.items())))

    def __str__(self) -> str:
        sides = []
        for groups in (self.ins, self.outs):
            words = [g[0] if len(g) == 1 else "1" if not g else "(" + " ".join(g) + ")" for g in groups]
            sides.append(" ".join(words))
        return " -> ".join(sides)

    @property
    def inverse(self) -> Pattern:
        return Pattern(self.outs, self.ins, self.sizes)

    @property
    def repeats(self) -> tuple[str, ...]:
        known = {n for g in self.ins for n in g}
        return tuple(n for g in self.outs for n in g if n not in known)

    def learn(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Every axis size, from the known ones and an input shape."""
        if len(shape) != len(self.ins):
            raise ShapeError(f"rearrange: x must have {len(self.ins)} axes for '{self}', got {tuple(shape)}")
        sizes = dict(self.sizes)
        for group, size in zip(self.ins, shape, strict=True):
            unknown = [n for n in group if n not in sizes]
            known = 1
            for n in group:
                known *= sizes.get(n, 1)
            if len(unknown) > 1:
                raise ShapeError(
                    f"rearrange: x must determine every axis of '{self}', got {tuple(shape)} with {unknown} unknown"
                )
            if unknown:
                if known == 0 or size % known:
                    raise ShapeError(f"rearrange: x must be divisible as '{self}' says, got {tuple(shape)}")
                sizes[unknown[0]] = size // known
            elif known != size:
                given = " ".join(f"{n}={sizes[n]}" for n in group)
                raise ShapeError(f"rearrange: x must fit '{self}' with {given or '1'}, got {tuple(shape)}")
        return sizes

    def resolve(self, shape: tuple[int, ...]) -> Affine:
        sizes = self.learn(shape)
        where: dict[str, tuple[int, int]] = {}
        for axis, group in enumerate(self.ins):
            step = 1
            for name in reversed(group):
                where[name] = (axis, step)
                step *= sizes[name]
        names = [n for g in self.outs for n in g]
        out_shape = []
        for group in self.outs:
            size = 1
            for n in group:
                size *= sizes[n]
            out_shape.append(size)
        return Affine(
            tuple(where.get(n, (-1, 0))[0] for n in names),
            tuple(sizes[n] for n in names),
            tuple(where.get(n, (-1, 0))[1] for n in names),
            tuple(shape),
            tuple(out_shape),
        )
