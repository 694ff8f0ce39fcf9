"""No op grows worse than its algorithm: what is counted (bytes held, bytes that torch's operators touch, scratch of the
native code, steps of the CUDA kernels), which no other load changes, and processor time with room for noise.

Trusted after mutation: a dense mask built beside a linear one, a pass over all pairs in blocks, a fit of one length, a
verdict that leaves the confidence out, and one without its tolerance each turned a test red. Processor time is red on
the native attention as it was before these curves found it: every strip of queries looked at every chunk of keys.
"""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import vkernels as vk
from vkernels import library
from vkernels.bench import growth
from vkernels.bench.contest import ours
from vkernels.bench.growth import CURVES, FRAMES, OURS, Curve, fit, grown, measure_curve, verdict
from vkernels.bench.memory import peak_mb
from vkernels.bench.problem import Problem
from vkernels.bench.results import Point, Run, load, store
from vkernels.library import native, native_missing
from vkernels.spec import OPS, Maker

pytestmark = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
FEW, MANY = 8, 32  # frames
SLACK = 1.05
LINEAR = [curve for curve in CURVES if curve.work(vk.Grid(200, 8, 16)) < 2.1 * curve.work(vk.Grid(100, 8, 16))]
named = pytest.mark.parametrize("curve", CURVES, ids=lambda curve: f"{curve.op}, {curve.id}")
linear = pytest.mark.parametrize("curve", LINEAR, ids=lambda curve: f"{curve.op}, {curve.id}")


class Traffic(TorchDispatchMode):
    """Bytes of what torch's operators are given and give back."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_flatten((args, kwargs, made))[0]:
            if isinstance(x, torch.Tensor):
                self.bytes += min(x.nbytes, x.untyped_storage().nbytes())
        return made


@named
def test_memory_grows_as_the_tokens(curve):
    """Also where time may grow faster: four times the tokens, four times the memory, plan and temporaries included."""
    peaks, scratch = [], []
    for frames in (FEW, MANY):
        call = ours(curve.at(frames).problem())
        before = native().scratch_bytes()
        peaks.append(peak_mb(call))
        scratch.append(native().scratch_bytes() - before)
    assert peaks[1] <= MANY / FEW * SLACK * peaks[0] + 0.01
    assert scratch[1] < torch.get_num_threads() << 20  # a thread has its own


def traffic(problem: Problem) -> int:
    with Traffic() as seen:
        ours(problem)()
    return seen.bytes


@named
def test_bytes_that_operators_touch_grow_as_the_tokens(curve):
    few, many = (traffic(curve.at(frames).problem()) for frames in (FEW, MANY))
    assert 0 < many <= MANY / FEW * SLACK * few


def steps(curve: Curve, frames: int) -> int:
    """Switches between the threads of emulated blocks: what the CUDA kernels do between barriers, counted."""
    kwargs = curve.make(vk.Grid(frames, 4, 8), Maker(torch.float16))
    kwargs |= {name: kwargs[name][:, :, :1] for name in "qkv" if name in kwargs and curve.op in ATTEND}
    before = library.emulator.module.switches()
    Problem(curve.op, kwargs).ours("cuda")()
    return library.emulator.module.switches() - before


ATTEND = ("attention", "divided_attention")
STEPPED = [curve for curve in LINEAR if curve.op in ATTEND and "window" not in curve.id]


@pytest.mark.skipif(library.emulator is None, reason="the CUDA kernels are not emulated here")
@pytest.mark.parametrize("curve", STEPPED, ids=lambda curve: f"{curve.op}, {curve.id}")
def test_steps_of_cuda_kernels_grow_as_the_visible_pairs(curve):
    few, many = steps(curve, 8), steps(curve, 32)
    assert 0 < many <= 4 * 1.3 * few


@cache
def processor_s(curve: Curve, frames: int) -> float:
    """The least processor time of one thread: what runs beside it takes time, not processor time."""
    call, taken = ours(curve.at(frames).problem()), []
    call()
    for _ in range(3):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return min(taken)


@linear
def test_processor_time_grows_as_the_tokens(curve):
    """Half of the way, on a logarithmic scale, from linear to quadratic, where neither length fits a cache and a look
    at every chunk of keys, cheap as one is, would be most of attention's time."""
    few, many = 128, 1024
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert processor_s(curve, many) < (many / few) ** 1.5 * max(processor_s(curve, few), 2e-5)
    finally:
        torch.set_num_threads(threads)


def test_every_op_has_a_curve_and_its_work_is_what_it_costs():
    assert {curve.op for curve in CURVES} == {*OPS, "lower_mask"}
    assert [128 * frames for frames in FRAMES][::7] == [1024, 131072]
    for curve in CURVES:
        if curve.op not in ATTEND:
            continue
        grid = vk.Grid(3, 8, 16)
        problem = curve.at(3).problem()
        q = problem.kwargs["q"]
        assert problem.cost().flop == 4 * q.shape[2] * q.shape[3] * curve.work(grid)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_fit_finds_the_power_and_says_how_surely(power):
    at = [1.0, 2.0, 4.0, 8.0]
    exact = fit(at, [3 * x**power for x in at])
    assert exact.exponent == pytest.approx(power)
    assert exact.half == pytest.approx(0.0, abs=1e-6)
    rough = fit(at, [3 * x**power * noise for x, noise in zip(at, (1.0, 1.3, 0.8, 1.1), strict=True)])
    # By hand: log2 of the noise is (0, .379, -.322, .138), so the slope is (-.5 .379 + .5 (-.322) + 1.5 .138) / 5.
    assert rough.exponent == pytest.approx(power - 0.0288, abs=1e-3)
    assert rough.half > 0.3
    assert fit(at[:2], at[:2]) is None


def points(power: float, memory: float = 1.0, op: str = "rearrange", who: str = OURS) -> list[Point]:
    lengths = [1024 * 2**i for i in range(8)]
    return [Point(op, "x", "float32", who, s, float(s), s // 128, 1e-3 * s**power, 1e-3 * s**memory) for s in lengths]


def test_the_verdict():
    assert verdict(points(1.0)) == []
    assert verdict(points(1.09)) == []
    assert verdict(points(0.5, memory=0.0)) == []
    assert verdict(points(2.0, who="rival")) == []
    assert "time grows as work^2.00 ± 0.00, and must not beyond 1.1" in verdict(points(2.0))[0]
    assert "memory grows as tokens^1.50 ± 0.00, and must not" in verdict(points(1.0, memory=1.5))[0]
    assert "measured at too few lengths" in verdict(points(1.0)[:2])[0]


def test_one_slow_moment_is_no_growth():
    slow = points(1.0)
    slow[-2] = Point(**{**slow[-2].__dict__, "ms": 3 * slow[-2].ms})
    assert verdict(slow) == []


def test_a_rival_that_runs_out_of_time_says_so(monkeypatch):
    curve = next(curve for curve in CURVES if curve.op == "lower_mask")
    found = measure_curve(curve, 1.0, frames=(2, 4, 8, 16))
    mine = [p for p in found if p.who == OURS]
    assert [p.tokens for p in mine] == [256, 512, 1024, 2048]
    assert all(p.ms and p.peak_mb for p in mine)
    monkeypatch.setattr(growth, "LEAST_S", 0.0)
    found = measure_curve(curve, 0.0, frames=(2, 4))
    assert "more than its share of the time" in str(found[1].why)
    monkeypatch.setattr(growth, "memory_left", lambda device: 1.0)
    found = measure_curve(curve, 9.0, frames=(2, 4))
    assert "are free" in str(found[1].why)


def test_the_command_judges_a_stored_run(tmp_path, capsys):
    good, bad = (store(Run({}, growth=points(power)), tmp_path / f"{power}.json") for power in (1.0, 2.0))
    assert growth.main(["--of", str(good)]) == 0
    assert "1 curves: none grows worse than its algorithm" in capsys.readouterr().out
    assert growth.main(["--of", str(bad)]) == 1
    assert growth.main(["--of", str(tmp_path / "none.json")]) == 2


def test_points_go_into_a_run_that_is_there(tmp_path, capsys, monkeypatch):
    run = store(Run({"commit": "1"}, growth=points(2.0)), tmp_path / "run.json")
    monkeypatch.setattr(growth, "measure", lambda ops, budget, report: points(1.0))
    assert growth.main(["--into", str(run)]) == 0
    assert load(run).environment == {"commit": "1"}
    assert grown(load(run).growth)[0].work.exponent == pytest.approx(1.0)
