"""Which lanes a run has: cases this library set itself, the specs' real sizes, models at so many frames, and what other
packages bring along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import torch

from vkernels.bench.case import BOTH, FORWARD, Bench, CallEntry, Case, Entry, OpEntry
from vkernels.bench.measure import Lane, Settings
from vkernels.bench.models import MODELS, model_cases
from vkernels.bench.own import own_cases
from vkernels.bench.runner import Session
from vkernels.roofline import Ceiling, measure_cpu
from vkernels.spec import all_specs

GROUP = "vkernels.bench"  # entry points: functions without arguments that give a list of Bench


@dataclass
class Choice:
    """What the command line asked for; empty means no limit."""

    ops: Sequence[str] = ()
    models: Sequence[str] = ()
    frames: Sequence[int] = ()
    dtypes: Sequence[torch.dtype] = ()
    rivals: Sequence[str] = ()
    match: str = ""
    backward: bool = False
    everything: bool = False
    device: str = "cpu"
    left_out: list[str] = field(default_factory=list)  # sentences, written by `lanes`


def spec_cases() -> list[Case]:
    """Every real size a spec states; a new op or size needs nothing here."""
    return [
        Case(spec.name, shape.id, shape.make, model=shape.model, dtypes=shape.dtypes)
        for spec in all_specs() for shape in spec.shapes
    ]  # fmt: skip


def brought_along(tell: Callable[[str], None] = print) -> list[Bench]:
    """The families of other packages; one that cannot be loaded says why."""
    found: list[Bench] = []
    known = list(entry_points(group=GROUP))
    if not known:
        tell("no package brings a family along: `pip install vkernels[hf]` has transformers' own parts")
    for point in known:
        try:
            found += point.load()()
        except Exception as error:
            tell(f"{point.name}: not measured: {type(error).__name__}: {error}")
    return found


def _wanted(case: Case | Bench, choice: Choice) -> bool:
    return (not choice.ops or case.op in choice.ops) and choice.match in f"{case.op} {case.id} {case.model}"


def _entries(cases: Sequence[Case], choice: Choice, half_only: bool = False) -> Iterator[Entry]:
    for case in cases:
        if not _wanted(case, choice):
            continue
        for dtype in case.dtypes:
            known = dtype in (choice.dtypes or case.dtypes) or not dtype.is_floating_point
            if not known or (half_only and not choice.dtypes and dtype == torch.float32 and len(case.dtypes) > 1):
                continue
            yield OpEntry(case, dtype, FORWARD, choice.device)
            if choice.backward or (case.backward and not half_only):
                yield OpEntry(case, dtype, BOTH, choice.device)


def _lanes(entries: Iterator[Entry], choice: Choice, compiled: bool) -> Iterator[Lane]:
    for entry in entries:
        for rival in entry.rivals:
            if choice.rivals:
                wanted = any(name in rival.name for name in choice.rivals)
            else:
                wanted = "math" not in rival.name and (compiled or not rival.compiles)
            if wanted:
                yield Lane(entry, rival)


def lanes(choice: Choice, ceiling: Ceiling, tell: Callable[[str], None] = print) -> list[Lane]:
    """Everything asked for that this device can measure; the rest is in `choice.left_out`."""
    found: list[Lane] = []
    by_model = bool(choice.models or choice.frames)
    if not by_model:
        found += _lanes(_entries(own_cases(), choice), choice, compiled=True)
        if choice.device == "cpu" and (not choice.ops or "integrations" in choice.ops):
            benches = [CallEntry(bench) for bench in brought_along(tell) if _wanted(bench, choice)]
            found += _lanes((b for b in benches if b.dtype in (choice.dtypes or [b.dtype])), choice, compiled=True)
    frames = choice.frames or ((8, 64) if by_model else (8,))
    at = [case for name in choice.models or MODELS for count in frames for case in model_cases(name, count)]
    found += _lanes(_entries(at, choice, half_only=True), choice, compiled=False)
    if not by_model:
        found += _lanes(_entries(spec_cases(), choice), choice, compiled=False)
    return found if choice.everything else _possible(found, choice, ceiling)


def _possible(found: list[Lane], choice: Choice, ceiling: Ceiling) -> list[Lane]:
    excuses: dict[int, str | None] = {}
    for lane in found:
        entry = lane.entry
        if id(entry) not in excuses:
            why = excuses[id(entry)] = entry.too_much(ceiling)
            if why:
                whose = f" ({entry.model})" if entry.model else ""
                choice.left_out.append(f"{entry.op}, {entry.id}{whose}, {entry.dtype}, {entry.direction}: {why}")
    return [lane for lane in found if excuses[id(lane.entry)] is None]


def quick_lanes(device: str) -> list[Lane]:
    """The telling few: one rival each, wins and losses."""
    found = []
    for case in own_cases():
        for dtype, name in case.quick.items():
            entry = OpEntry(case, dtype, FORWARD, device)
            found += [Lane(entry, rival) for rival in entry.rivals if rival.name == name]
    return found


def quick_session() -> Session:
    return Session(quick_lanes("cpu"), Settings(measure_cpu()))
