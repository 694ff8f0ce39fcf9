"""One case raced: every backend of ours against every rival, forward and backward. Correct first, then in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.cases import DeviceMaker, Race
from benchmarks.gpu.proof import backends, context_is_lost, refused
from vkernels.bench.clock import in_turn, spread
from vkernels.bench.measure import TOLERANCE, relative_error
from vkernels.bench.problem import Call, Problem, backward_cost, name_of, outputs, pulls_of, without_gradients
from vkernels.bench.rivals import Rival, reason, rivals_of

BAND = 256 << 20  # bytes from which a share of the copy rate is judged


@dataclass(frozen=True)
class Unit:
    """What is raced at a time: a case in one dtype and direction."""

    race: Race
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        return f"{self.race.op}/{self.race.id}/{name_of(self.dtype)}/{self.direction}"

    def row(self, problem: Problem) -> dict[str, Any]:
        """What every row of it says."""
        race, spec = self.race, problem.spec
        row = {"op": race.op, "id": race.id, "model": race.model, "dtype": name_of(self.dtype)}
        if spec and (kind := next((b.kind for b in spec.backends if b.kind is not None), None)):
            row["kind"] = kind(spec.prepare(**problem.kwargs))[1]
        return row | {"direction": self.direction}


def units(race: Race) -> list[Unit]:
    directions = ("forward", "backward") if race.gradients else ("forward",)
    return [Unit(race, dtype, direction) for dtype in race.dtypes for direction in directions]


@dataclass
class Track:
    """Where units are raced. `seconds` is the measuring time of one comparison. Without a timer everything is run and
    compared and nothing timed: what is compiled then is found compiled later."""

    device: str
    timer: Any
    limits: dict[str, Any]
    seconds: float
    busy: Callable[[str, bool], None] = lambda who, ours: None  # told who runs next, before it can hang or crash


def race_unit(unit: Unit, track: Track, without: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """A row per backend of ours. `without`: who broke an earlier attempt, and how; "" where a row is known."""
    without, race = without or {}, unit.race
    problem = Problem(race.op, race.make(DeviceMaker(unit.dtype, track.device)), race.visible)
    problem.kwargs.pop("return_lse", None)  # an output nobody else has
    spec, kwargs = problem.spec, problem.kwargs
    leaves = problem.leaves() if unit.direction == "backward" else []
    if unit.direction == "backward" and not leaves:
        return
    row = unit.row(problem)
    opponents, excuses = _opponents(problem, leaves, track, without)
    for name in backends(spec, track.device) if spec else ["torch"]:
        if name in without:
            continue
        if spec and (why := refused(spec, name, kwargs)):
            yield {**row, "backend": name, "status": "skipped", "why": why}
            continue
        track.busy(name, True)
        ours = _directed(problem.ours(name if spec else None), leaves)
        try:
            measured = _measured(row | {"backend": name}, race, problem, ours, opponents, track)
        except torch.cuda.OutOfMemoryError:
            yield {**row, "backend": name, "status": "skipped", "why": "does not fit this GPU's memory"}
        except AssertionError as error:
            yield {**row, "backend": name, "status": "failed", "why": f"not timed: {error}"}
        except Exception as error:
            if context_is_lost(error):
                raise
            yield {**row, "backend": name, "status": "failed", "why": reason(error)}
        else:
            measured["rivals"] += excuses
            yield measured


def _opponents(
    problem: Problem, leaves: Sequence[torch.Tensor], track: Track, without: Mapping[str, str]
) -> tuple[list[Opponent], list[dict[str, Any]]]:
    """The rivals that ran once, and why the others cannot."""
    opponents: list[Opponent] = []
    excuses: list[dict[str, Any]] = []
    for rival in rivals_of(problem.op):
        if "math" in rival.name:
            continue
        if rival.name in without:
            excuses.append({"name": rival.name, "why": without[rival.name]})
            continue
        track.busy(rival.name, False)
        opponent = _ready(rival, problem, leaves)
        if isinstance(opponent, Opponent):
            opponents.append(opponent)
        elif opponent is not None:
            excuses.append(opponent)
    return opponents, excuses


def _directed(call: Call, leaves: Sequence[torch.Tensor]) -> Call:
    """`call` itself without gradients, or its backward alone, its graph kept."""
    if not leaves:
        return without_gradients(call)
    graph: list[Any] = []

    def backward() -> Any:
        if not graph:
            made = [x for x in outputs(call()) if x.requires_grad and x.dtype == leaves[0].dtype]
            graph.extend((made, pulls_of(made)))
        return torch.autograd.grad(graph[0], leaves, graph[1], retain_graph=True, allow_unused=True)

    return backward


@dataclass(frozen=True)
class Opponent:
    name: str
    call: Call
    compare: bool


def _ready(rival: Rival, problem: Problem, leaves: Sequence[torch.Tensor]) -> Opponent | dict[str, Any] | None:
    """The rival, having run once; or why it cannot; or None where it is not about such a call."""
    try:
        call = rival.prepare(problem)
        if call is None:
            return None
        directed = _directed(call, leaves if rival.compare else [])
        directed()
        return Opponent(rival.name, directed, rival.compare)
    except Exception as error:
        if context_is_lost(error):
            raise
        return {"name": rival.name, "why": reason(error)}


def _agrees(ours: Any, rival: Any, dtype: torch.dtype) -> float:
    a, b = outputs(ours), outputs(rival)
    assert a, "our call returned no tensor"
    count = min(len(a), len(b))
    return relative_error(a[:count], b[:count])


def _measured(
    row, race: Race, problem: Problem, ours: Call, opponents: Sequence[Opponent], track: Track
) -> dict[str, Any]:
    dtype = getattr(torch, row["dtype"])
    result = ours()
    errors, wrong = {}, []
    for opponent in opponents:
        if opponent.compare:
            errors[opponent.name] = _agrees(result, opponent.call(), dtype)
            if not errors[opponent.name] <= TOLERANCE[dtype]:
                wrong.append(f"differs from {opponent.name} by {errors[opponent.name]:.1e}")
    assert not wrong, "; ".join(wrong)
    del result
    if track.timer is None:
        return {**row, "status": "warmed", "rivals": []}
    times = in_turn(track.timer, [ours, *(o.call for o in opponents)], track.seconds)
    mine, low, high = spread(times[0])
    cost = problem.cost() if row["direction"] == "forward" else backward_cost(problem.op, problem.cost())
    flop, moved = cost.flop, cost.bytes
    raced = []
    for opponent, theirs in zip(opponents, times[1:], strict=True):
        ratio = spread([r / o for o, r in zip(times[0], theirs, strict=True)])
        raced.append(
            {
                "name": opponent.name,
                "ms": spread(theirs)[0],
                "ratio": ratio[0],
                "ratio_p20": ratio[1],
                "ratio_p80": ratio[2],
                "error": errors.get(opponent.name),
            }
        )
    measured = {
        **row,
        "status": "measured",
        "ms": mine,
        "ms_p20": low,
        "ms_p80": high,
        "gb_per_s": moved / mine / 1e6,
        "copy_share": moved / mine / 1e6 / track.limits["copy_gb_per_s"],
        "tflop_per_s": flop / mine / 1e9,
        "product_share": flop / mine / 1e9 / track.limits["bf16_tflop_per_s"],
        "bytes": moved,
        "rivals": raced,
    }
    target = race.forward if row["direction"] == "forward" else race.backward
    return measured | judged(target, measured)


def judged(target: Any, row: dict[str, Any]) -> dict[str, Any]:
    """{"target", "passed"}: None where there is nothing to judge."""
    if target is None:
        return {"target": None, "passed": None}
    if target.kind == "copy":
        small = row["bytes"] < BAND and target.value >= 0.9
        return {"target": str(target), "passed": None if small else row["copy_share"] >= target.value}
    if target.kind == "tflops":
        return {"target": str(target), "passed": row["tflop_per_s"] >= target.value}
    if target.kind == "us":
        return {"target": str(target), "passed": row["ms"] * 1e3 <= target.value}
    ratios = [r["ratio"] for r in row["rivals"] if r["name"].startswith(target.rival)]
    return {"target": str(target), "passed": min(ratios) >= target.value if ratios else None}
