"""Measure the candidates of tiles.json on an op's real sizes, one kernel launch at a time, and write the best as rows.

A launch is noted down as it would happen with a candidate's tiles, compiled, left out where it breaks a rule of
`vkernels/triton/aot.py`, and timed by itself. Candidates come in one order; a later one must be 2 % better to win, so
two runs that measure the same write the same.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vkernels.spec import Blank, OpSpec, Shape
from vkernels.testing.results import tensors_of
from vkernels.triton import aot
from vkernels.triton.launch import Launch, recording
from vkernels.triton.tiles import LIMITS, asking, home, overridden, table, tiles

Row = dict[str, int]
Group = tuple[str, int, int]  # kernel, d, bytes: what one row serves
BETTER = 0.98
TOLERANCE = 2e-2  # of the largest magnitude, between the outputs of two tilings


class Drawn(Blank):
    """Large tensors of normal values, drawn where they are used."""

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=scale)


@dataclass
class Tuned:
    """What was found for one group."""

    group: Group
    row: Row
    ms: float
    before: Row
    before_ms: float
    tried: int
    left_out: list[str] = field(default_factory=list)


def candidates(op: str, kernel: str, now: Row) -> list[Row]:
    """Every combination of the stated values, what is used now first; what has no candidates keeps its value."""
    stated = table(op)[kernel].get("candidates", {})
    drawn = [dict(zip(stated, values, strict=True)) for values in itertools.product(*stated.values())]
    return [now, *(row for row in ({**now, **c} for c in drawn) if row != now)]


def replay(launch: Launch) -> None:
    """A noted launch, run."""
    launch.kernel[launch.grid](**launch.arguments, **launch.options)


def median_ms(launch: Launch) -> float:
    from triton.testing import do_bench

    return float(do_bench(lambda: replay(launch), warmup=5, rep=25, return_mode="median"))


def _call(spec: OpSpec, shape: Shape, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs, and gradients where the op has any: every kernel of the op is launched."""
    leaves = [kwargs[name] for name in spec.differentiable if isinstance(kwargs.get(name), torch.Tensor)]
    leaves = [x.requires_grad_() for x in leaves] if shape.gradients else []
    outputs = tensors_of(spec, spec.fn(**kwargs, backend="triton"))
    pulled = [x for x in outputs if x.requires_grad]
    if not leaves or not pulled:
        return outputs
    grads = torch.autograd.grad(pulled, leaves, [torch.ones_like(x) for x in pulled], allow_unused=True)
    return [*(x.detach() for x in outputs), *(g for g in grads if g is not None)]


def _noted(spec: OpSpec, shape: Shape, kwargs: dict[str, Any], arch: str) -> tuple[list[Launch], set[Group]]:
    with recording(arch) as launches, asking() as asked:
        _call(spec, shape, kwargs)
    return list(launches), {(kernel, d, size) for op, kernel, d, size in asked if op == spec.name}


def _sizes(spec: OpSpec, device: str) -> Iterator[tuple[Shape, torch.dtype, dict[str, Any]]]:
    for shape in spec.shapes:
        for dtype in shape.dtypes:
            yield shape, dtype, shape.make(Drawn(dtype, device))


def tune(
    spec: OpSpec,
    arch: str,
    *,
    device: str = "cuda",
    until: float = math.inf,
    measure: Callable[[Launch], float] = median_ms,
    faults: Callable[[Launch, str, OpSpec, Shape], list[str]] | None = None,
    check: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> list[Tuned]:
    """The best row of every group that an op's real sizes ask for; groups that `until` cuts short stay as they are."""
    find_faults = faults or _faults
    times: dict[Group, dict[str, list[float]]] = {}
    rows: dict[Group, list[Row]] = {}
    left_out: dict[Group, list[str]] = {}
    for shape, _, kwargs in _sizes(spec, device):
        _, groups = _noted(spec, shape, kwargs, arch)
        for group in sorted(groups):
            kernel, d, size = group
            if "candidates" not in table(spec.name)[kernel]:
                continue
            rows.setdefault(group, candidates(spec.name, kernel, tiles(spec.name, kernel, arch, d=d, bytes=size)))
            spent = times.setdefault(group, {json.dumps(row): [] for row in rows[group]})
            for row in rows[group]:
                name = json.dumps(row)
                if clock() >= until:
                    return _best(rows, times, left_out, whole=False)
                if name not in spent:
                    continue
                with overridden(kernel, row):
                    launches = [x for x in _noted(spec, shape, kwargs, arch)[0] if x.name == kernel.split(",")[0]]
                found = [fault for launch in launches for fault in find_faults(launch, arch, spec, shape)]
                if found:
                    del spent[name]
                    left_out.setdefault(group, []).append(f"{name}: {found[0]}")
                else:
                    spent[name].append(sum(measure(launch) for launch in launches))
    best = _best(rows, times, left_out, whole=True)
    return [_checked(spec, tuned, device) for tuned in best] if check else best


def _faults(launch: Launch, arch: str, spec: OpSpec, shape: Shape) -> list[str]:
    return aot.judged(launch, arch, table(spec.name)[launch.name]["bound"], shape)[1]


def _best(
    rows: dict[Group, list[Row]],
    times: dict[Group, dict[str, list[float]]],
    left_out: dict[Group, list[str]],
    whole: bool,
) -> list[Tuned]:
    found = []
    for group in sorted(rows):
        spent = times[group]
        sizes = max((len(x) for x in spent.values()), default=0)
        complete = all(len(x) == sizes for x in spent.values())
        measured = {name: sum(x) for name, x in spent.items() if sizes and len(x) == sizes}
        if not measured or not (whole or complete):
            continue
        now = json.dumps(rows[group][0])
        winner, least = "", math.inf
        for row in rows[group]:
            spend = measured.get(json.dumps(row), math.inf)
            if spend < least * BETTER or (not winner and spend < least):
                winner, least = json.dumps(row), spend
        before = measured.get(now, math.nan)
        found.append(
            Tuned(group, json.loads(winner), least, rows[group][0], before, len(measured), left_out.get(group, []))
        )
    return found


def _checked(spec: OpSpec, tuned: Tuned, device: str) -> Tuned:
    """The winner gives the outputs and gradients of the tiles that were tested before, or it does not win."""
    if tuned.row == tuned.before:
        return tuned
    for shape, _, kwargs in _sizes(spec, device):
        if tuned.group not in _noted(spec, shape, kwargs, "sm80")[1]:
            continue
        with overridden(tuned.group[0], tuned.before):
            wanted = [x.double() for x in _call(spec, shape, kwargs)]
        with overridden(tuned.group[0], tuned.row):
            got = [x.double() for x in _call(spec, shape, kwargs)]
        for a, b in zip(got, wanted, strict=True):
            error = _difference(a, b)
            if error > TOLERANCE:
                why = f"{json.dumps(tuned.row)}: its outputs differ by {error:.1e}"
                return Tuned(
                    tuned.group, tuned.before, tuned.before_ms, tuned.before, tuned.before_ms, tuned.tried,
                    [*tuned.left_out, why],
                )  # fmt: skip
    return tuned


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |a - b| relative to the largest |b|; infinities (the lse of rows that see nothing) must coincide."""
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return math.inf
    if not finite.any():
        return 0.0
    return float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1e-12))


def write(op: str, arch: str, tuned: list[Tuned], folder: Path | None = None) -> Path:
    """Rows of `arch` in the op's tiles.json: what was tuned, narrowest first, then a row that serves the rest."""
    path = (folder or home(op)) / "tiles.json"
    whole = json.loads(path.read_text())
    for kernel in sorted({t.group[0] for t in tuned}):
        rows = []
        for t in sorted((t for t in tuned if t.group[0] == kernel), key=lambda t: t.group):
            limits = {name: value for name, value in zip(LIMITS, t.group[1:], strict=True) if value}
            rows.append({**limits, **t.row})
        last = tiles(op, kernel, arch, d=10**9, bytes=8)
        if all(set(LIMITS) & set(row) for row in rows):
            rows.append(last)
        whole[kernel][arch] = rows
    path.write_text(rendered(whole))
    table.cache_clear()
    return path


def rendered(whole: dict[str, Any]) -> str:
    """JSON with a row a line, as the tables are kept."""
    kernels = []
    for name, kernel in whole.items():
        entries = []
        for key, value in kernel.items():
            if isinstance(value, list) and len(value) > 1:
                lines = ",\n".join(f"      {json.dumps(row)}" for row in value)
                entries.append(f"    {json.dumps(key)}: [\n{lines}\n    ]")
            else:
                entries.append(f"    {json.dumps(key)}: {json.dumps(value)}")
        kernels.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(entries) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def lines(op: str, tuned: list[Tuned]) -> Iterator[str]:
    """What was found, in words."""
    for t in tuned:
        kernel, d, size = t.group
        gain = t.before_ms / t.ms if t.ms else 1.0
        kept = "kept" if t.row == t.before else f"{gain:.2f}x"
        yield f"{op} {kernel} d={d} bytes={size}: {json.dumps(t.row)} {t.ms:.4g} ms ({kept}; {t.tried} tried)"
        for why in t.left_out:
            yield f"  left out {why}"
