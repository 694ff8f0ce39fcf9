"""One case raced: every backend of ours against every rival, forward and backward. Correct first, then in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

import vkernels as vk
from benchmarks.gpu.cases import DeviceMaker, Race
from benchmarks.gpu.proof import backends, refused
from benchmarks.gpu.rivals import Rival, rivals
from benchmarks.gpu.timing import in_turn, spread
from vkernels.bench.measure import relative_error
from vkernels.spec import OpSpec
from vkernels.testing.results import tensors_of

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of the largest magnitude
BAND = 256 << 20  # bytes from which a share of the copy rate is judged


def race_case(race: Race, device: str, timer: Any, limits: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Rows of one case; `seconds` is the measuring time of one comparison. Without a timer everything is run and
    compared and nothing timed: what is compiled then is found compiled later."""
    rows = []
    for dtype in race.dtypes:
        for direction in ("forward", "backward") if race.gradients else ("forward",):
            rows += _race(race, dtype, direction, device, timer, limits, seconds)
            if device.startswith("cuda"):
                gc.collect()
                torch.cuda.empty_cache()
    return rows


def _race(race: Race, dtype, direction: str, device: str, timer: Any, limits: dict, seconds: float) -> list[dict]:
    kwargs = race.make(DeviceMaker(dtype, device))
    kwargs.pop("return_lse", None)  # an output nobody else has
    spec = None if race.op == "lower_mask" else import_module(f"vkernels.ops.{race.op}.spec").SPEC
    leaves = _leaves(spec, kwargs) if direction == "backward" else []
    if direction == "backward" and not leaves:
        return []
    row = {
        "op": race.op,
        "id": race.id,
        "model": race.model,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
    }
    if spec and (kind := next((b.kind for b in spec.backends if b.kind is not None), None)):
        row["kind"] = kind(spec.prepare(**kwargs))[1]
    opponents, excuses = [], []
    for name, prepare in rivals(race, kwargs):
        opponent = _ready(name, prepare, leaves)
        (opponents if isinstance(opponent, Rival) else excuses).append(opponent)
    rows = []
    names = backends(spec, device) if spec else ["torch"]
    for name in names:
        if spec and (why := refused(spec, name, kwargs)):
            rows.append({**row, "backend": name, "status": "skipped", "why": why})
            continue
        ours = _directed(_ours(spec, kwargs, name), leaves)
        try:
            rows.append(_measured(row | {"backend": name}, race, spec, kwargs, ours, opponents, timer, limits, seconds))
        except AssertionError as error:
            rows.append({**row, "backend": name, "status": "failed", "why": f"not timed: {error}"})
            continue
        rows[-1]["rivals"] += excuses
    return rows


def _leaves(spec: OpSpec | None, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    if spec is None or isinstance(kwargs.get("cache"), vk.KVCache):
        return []
    names = [name for name in spec.differentiable if isinstance(kwargs.get(name), torch.Tensor)]
    for name in names:
        kwargs[name] = kwargs[name].detach().requires_grad_()
    return [kwargs[name] for name in names]


def _ours(spec: OpSpec | None, kwargs: dict[str, Any], backend: str) -> Callable[[], Any]:
    """A call that may be repeated: what it appends to a cache is taken back first, on the host."""
    if spec is None:
        return lambda: vk.lower_mask(kwargs["mask"](), kwargs["device"])
    cache = kwargs.get("cache")
    if not isinstance(cache, vk.KVCache):
        return lambda: tensors_of(spec, spec.fn(**kwargs, backend=backend)) if spec.outputs else spec.fn(
            **kwargs, backend=backend
        )  # fmt: skip
    lengths, counts = list(cache._lengths), cache.lengths

    def call() -> Any:
        cache._lengths, cache.lengths = list(lengths), counts
        return spec.fn(**kwargs, backend=backend)

    return call


def _first(result: Any) -> list[torch.Tensor]:
    """The outputs that everyone has: lse and the like are ours alone."""
    flat = result if isinstance(result, (list, tuple)) else [result]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def _directed(call: Callable[[], Any], leaves: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """`call` itself without gradients, or its backward alone, its graph kept."""
    if not leaves:

        def forward() -> Any:
            with torch.no_grad():
                return call()

        return forward
    graph: list[Any] = []

    def backward() -> Any:
        if not graph:
            outputs = [x for x in _first(call()) if x.requires_grad and x.dtype == leaves[0].dtype]
            generator = torch.Generator(outputs[0].device).manual_seed(7)
            pulls = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs]
            graph.extend((outputs, pulls))
        return torch.autograd.grad(graph[0], leaves, graph[1], retain_graph=True, allow_unused=True)

    return backward


def _ready(name: str, prepare: Callable[[], Rival], leaves: Sequence[torch.Tensor]) -> Rival | dict[str, Any]:
    """The rival, having run once; or why it cannot."""
    try:
        made = prepare()
        call = _directed(made.call, leaves if made.compare else [])
        call()
        return Rival(name, call, made.compare)
    except Exception as error:
        return {
            "name": name,
            "why": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}",
        }


def _agrees(ours: Any, rival: Any, dtype: torch.dtype) -> float:
    a, b = _first(ours), _first(rival)
    assert a, "our call returned no tensor"
    count = min(len(a), len(b))
    return relative_error(a[:count], b[:count])


def _measured(
    row, race: Race, spec, kwargs, ours, opponents: Sequence[Rival], timer, limits, seconds
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
    if timer is None:
        return {**row, "status": "warmed", "rivals": []}
    times = in_turn(timer, [ours, *(o.call for o in opponents)], seconds)
    mine, low, high = spread(times[0])
    flop, moved = _cost(spec, kwargs, row["direction"])
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
        "copy_share": moved / mine / 1e6 / limits["copy_gb_per_s"],
        "tflop_per_s": flop / mine / 1e9,
        "product_share": flop / mine / 1e9 / limits["bf16_tflop_per_s"],
        "bytes": moved,
        "rivals": raced,
    }
    target = race.forward if row["direction"] == "forward" else race.backward
    return measured | judged(target, measured)


def _cost(spec: OpSpec | None, kwargs: dict[str, Any], direction: str) -> tuple[float, float]:
    """FLOP and bytes at the least. Backward of attention makes 5 products of the forward's 2 and moves twice its bytes;
    that of a move moves the same again."""
    if spec is None:
        return 0.0, 0.0
    cost = spec.cost(spec.prepare(**kwargs))
    if direction == "forward":
        return cost.flop, cost.bytes
    attends = "attention" in spec.name
    return cost.flop * (2.5 if attends else 1.0), cost.bytes * (2.0 if attends else 1.0)


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
