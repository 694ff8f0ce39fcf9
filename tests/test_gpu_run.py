"""`make gpu`, run without a GPU: the same programs at toy sizes on the CPU, every rival called and compared, every cell
of the table and the JSON written. What only a GPU can say is not in here: its times.

Trusted after mutation: a rival that returns its input, a NaN in our output, a hung worker waited for, a failure that
leaves the exit status 0, a build killed without being asked to end, shares of memory nobody waits for, and a graph
compared with itself each turned a test red.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report, supervise, worker
from benchmarks.gpu.cases import Race, Target, own_races, races
from benchmarks.gpu.proof import backends, capture_one, prove, prove_masks
from benchmarks.gpu.race import Track, judged, race_unit, units
from benchmarks.readme import gpu_numbers
from vkernels.bench import rivals
from vkernels.bench.clock import WallTimer, in_turn, spread
from vkernels.bench.measure import relative_error
from vkernels.bench.problem import Problem, with_contents
from vkernels.bench.rivals import sdpa
from vkernels.library import INTERPRETED
from vkernels.masks import VideoMask
from vkernels.spec import Blank, Case, Shape, all_specs, compiled_specs
from vkernels.testing.results import tensors_of

LIMITS = {"copy_gb_per_s": 50.0, "bf16_tflop_per_s": 0.4}
NOT_ON_CPU = (
    "is not installed",
    "No viable backend",
    "No operator found",
    "does not support backward on CPU",
    "Backward",
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """SDPA's CUDA kernels are played by its plain one; compiling is left out; ours is the CPU's."""
    monkeypatch.setattr("benchmarks.gpu.race.backends", lambda spec, device: ["cpu"])
    for name in sdpa.KERNELS:
        monkeypatch.setitem(sdpa.KERNELS, name, SDPBackend.MATH)
    monkeypatch.setattr(rivals, "compiled", lambda function: function)


def race_case(race, timer=None, seconds=0.0):
    track = Track("cpu", timer, LIMITS, seconds)
    return [row for unit in units(race) for row in race_unit(unit, track)]


def in_this_process(stage, arguments, *, on_report, until, patience, before=()):
    """run_stage without processes."""
    said = []
    options = worker.parse([stage, *arguments])
    {"machine": worker.machine, "proof": worker.proof, "race": worker.race}[stage](options, said.append)
    for row in said:
        if not {"begin", "busy", "end", "plan"} & set(row):
            on_report(row)
    return []


def test_a_whole_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run_stage", in_this_process)
    monkeypatch.setattr(gpu, "cuda_tool", lambda name: None)
    arguments = gpu.parse(["--device=cpu", "--small", "--no-build", f"--out={tmp_path}"])
    run = gpu.Run(arguments)
    run.deadlines = {**gpu.DEADLINES}
    monkeypatch.setattr(gpu.Run, "proof", lambda self: self._prove(["--op=kv_append", "--few"]))
    assert run.all() == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("gpu-*.json")
    stored = json.loads(path.read_text())
    assert stored == json.loads(json.dumps(run.found))
    assert {row["status"] for row in stored["proof"]} == {"passed"}
    measured = [row for row in stored["race"] if row["status"] == "measured"]
    assert {(row["op"], row["id"]) for row in measured} == {(race.op, race.id) for race in own_races(small=True)}
    for row in measured:
        ran = [rival for rival in row["rivals"] if "ms" in rival]
        for rival in row["rivals"]:
            assert "ms" in rival or any(reason in rival["why"] for reason in NOT_ON_CPU), rival
        assert ran, f"{row['op']} {row['id']} {row['direction']} met no rival"
        assert row["ms"] > 0
        assert all(rival["ratio_p20"] <= rival["ratio"] <= rival["ratio_p80"] for rival in ran)
    said = capsys.readouterr().out
    assert report.table(stored) in said
    assert "0 failures" in said
    text = report.markdown(stored)
    assert text.count("\n| ") == len(measured) + 1
    assert stored["environment"]["gpu"] in text


@pytest.mark.parametrize("spec", all_specs(), ids=lambda s: s.name)
def test_rivals_agree_on_every_case_of_a_spec(spec):
    """Real sizes are raced the same way, whatever op they come from."""
    for case in spec.cases:
        race = Race(spec.name, case.id, with_contents(case).make, dtypes=(torch.float32,))
        for row in race_case(race):
            assert row["status"] in ("warmed", "skipped"), row
            for rival in row["rivals"]:
                assert any(reason in rival["why"] for reason in NOT_ON_CPU), rival


@pytest.mark.skipif(find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter")
def test_triton_is_raced(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.race.backends", backends)
    race = next(r for r in own_races(small=True) if r.op == "apply_rope")
    rows = race_case(race)
    assert [(row["backend"], row["direction"], row["status"]) for row in rows] == [
        (backend, direction, "warmed") for direction in ("forward", "backward") for backend in ("cpu", "triton")
    ]


def test_a_real_size_is_proven(monkeypatch):
    spec = next(s for s in all_specs() if s.name == "decode_attention")
    shape = Shape("toy", spec.cases[0].make, dtypes=(torch.bfloat16,))
    said = []
    monkeypatch.setattr("benchmarks.gpu.proof.backends", lambda spec, device: ["cpu"])
    prove(spec, [shape], "cpu", report=said.append)
    name = "decode_attention/cpu/toy/bfloat16"
    assert said[0] == {"plan": [name]}
    assert (said[2]["id"], said[2]["status"]) == (name, "passed")


def test_plans_of_masks_are_proven(monkeypatch):
    """Those of lower_mask's cases and of attention's; a plan that differs in one element fails."""
    monkeypatch.setattr("benchmarks.gpu.proof.backends", lambda spec, device: ["reference"])
    said = []
    worker.proof(worker.parse(["proof", "--device=cpu", "--op=lower_mask"]), said.append)
    rows = [row for row in said if "status" in row]
    assert {"lower_mask/reference/frame_causal", "lower_mask/reference/attention/keep"} <= {row["id"] for row in rows}
    assert {(row["op"], row["status"]) for row in rows} == {("lower_mask", "passed")}

    def off_by_one(mask, device, backend):
        plan = plan_of(mask, device, "reference")
        return plan if backend == "reference" else replace(plan, ranges=plan.ranges - 1, _cache={})

    plan_of = VideoMask.plan
    monkeypatch.setattr(VideoMask, "plan", off_by_one)
    monkeypatch.setattr("benchmarks.gpu.proof.refused", lambda *_: None)
    monkeypatch.setattr("benchmarks.gpu.proof.backends", lambda spec, device: ["wrong"])
    cases = [Case("causal", lambda m: {"mask": VideoMask.causal(5)})]
    said.clear()
    prove_masks(cases, "cpu", report=said.append)
    assert said[2]["status"] == "failed"
    assert "argument 5 of the plan differs" in said[2]["why"]


@pytest.mark.parametrize("spec", all_specs(), ids=lambda s: s.name)
def test_a_call_is_captured_and_replayed(monkeypatch, spec):
    """The graph played by the call itself; one that gives what it gave when it was captured is found out."""
    monkeypatch.setattr("benchmarks.gpu.proof.captured", lambda call: call)
    assert capture_one(spec, "cpu", spec.cases, "cpu") == ("passed", "")

    def stale(call):
        held = [x.clone() for x in tensors_of(spec, call())]
        return lambda: held

    monkeypatch.setattr("benchmarks.gpu.proof.captured", stale)
    monkeypatch.setattr("benchmarks.gpu.proof.tensors_of", lambda s, r: r if type(r) is list else tensors_of(s, r))
    with pytest.raises(AssertionError, match="of the replay differs"):
        capture_one(spec, "cpu", spec.cases, "cpu")


def test_real_sizes_have_memory_of_their_own(monkeypatch, tmp_path):
    """Never more than there is at a time, and attention's float64 gets most of it."""
    running, most, seen = [], [], []

    def stage(name, arguments, **_):
        given = {x.split("=")[0]: x.split("=")[1] for x in arguments if "=" in x}
        share = float(given["--memory"])
        running.append(share)
        most.append(sum(running))
        seen.append((name, given["--op"], "--shapes" in arguments, share))
        time.sleep(0.02)
        running.remove(share)
        return []

    monkeypatch.setattr(gpu, "run_stage", stage)
    monkeypatch.setattr(gpu, "cuda_tool", lambda name: None)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    gpu.Run(gpu.parse([f"--out={tmp_path}"])).proof()
    ops = {spec.name for spec in compiled_specs()}
    assert {op for name, op, shapes, _ in seen if name == "proof" and shapes} == ops
    assert {op for name, op, shapes, _ in seen if name == "proof" and not shapes} == ops
    assert max(most) <= 0.91
    assert next(share for _, op, shapes, share in seen if shapes and op == "attention") >= 0.6


def test_every_size_of_every_spec_is_raced():
    raced = {(race.op, race.id) for race in races()}
    assert {(spec.name, shape.id) for spec in all_specs() for shape in spec.shapes} <= raced
    assert len(raced) == len(races()), "two races of one name"


def test_what_is_promised_for_a_gpu_is_raced():
    """Sizes and targets that docs/kernels state, by the beginning of the target."""
    stated = {(race.op, race.id): (str(race.forward), str(race.backward)) for race in own_races()}
    assert stated["attention", "frame-causal 32,768, d=128"] == (">= 600 TFLOP/s", ">= 480 TFLOP/s")
    assert stated["attention", "keep 50% of 8,192 keys"][0] == ">= 1.9x SDPA"
    assert stated["attention", "keep 25% of 8,192 keys"][0] == ">= 3.7x SDPA"
    assert stated["divided_attention", "spatial 576 + 0, 16 frames, d=64"][0] == ">= 480 TFLOP/s"
    assert stated["divided_attention", "spatial 1024 + 0, 16 frames, d=64"][0] == ">= 500 TFLOP/s"
    keys = next(race for race in own_races() if race.id == "keep 25% of 8,192 keys")
    plan = keys.make(Blank())["mask"].plan("cpu")
    assert plan.q_rows is None
    assert 1900 < int(plan.k_count) < 2200


def test_a_wrong_kernel_has_no_speed(monkeypatch):
    race = next(r for r in own_races(small=True) if r.op == "apply_rope")
    monkeypatch.setattr(Problem, "ours", lambda self, backend=None: lambda: self.kwargs["q"] * 0.9)
    row = race_case(race, WallTimer(), 0.01)[0]
    assert row["status"] == "failed"
    assert "not timed: differs from Hugging Face eager by" in row["why"]
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_targets_are_judged():
    row = {
        "bytes": 1e9,
        "copy_share": 0.85,
        "tflop_per_s": 410.0,
        "ms": 0.03,
        "rivals": [{"name": "SDPA x", "ratio": 2}],
    }
    assert judged(Target("copy", 0.8), row)["passed"] is True
    assert judged(Target("copy", 0.9), row)["passed"] is False
    assert judged(Target("copy", 0.9), {**row, "bytes": 1e6})["passed"] is None
    assert judged(Target("tflops", 420), row)["passed"] is False
    assert judged(Target("us", 36), row)["passed"] is True
    assert judged(Target("ratio", 2.5, "SDPA"), row) == {"target": ">= 2.5x SDPA", "passed": False}
    assert judged(Target("ratio", 2, "permute"), row)["passed"] is None
    assert judged(None, row) == {"target": None, "passed": None}
    assert report.verdict({"passed": False}, "NVIDIA H200") == "MISS"
    assert report.verdict({"passed": True}, "NVIDIA A100") == "not judged"


def test_calls_are_timed_in_turn():
    order = []
    times = in_turn(WallTimer(), [lambda: order.append("a"), lambda: order.append("b")], 0.0)
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(times[0]) == len(times[1]) >= 5
    assert spread([3.0, 1.0, 2.0, 4.0, 5.0]) == (3.0, 2.0, 5.0)


SAY = "import time; from benchmarks.gpu.supervise import emit; "


def watched(code, until=30.0, patience=30.0):
    heard = []
    command = [sys.executable, "-c", SAY + code]
    how, noise = supervise.watch(command, until=time.monotonic() + until, patience=patience, on_report=heard.append)
    return how, heard, noise


def test_a_worker_is_watched():
    assert watched("emit({'row': 1}); print('noise')") == ("ended", [{"row": 1}], "noise")
    how, heard, noise = watched("emit({'row': 1}); raise SystemExit('broken')")
    assert (how, heard, noise) == ("crashed", [{"row": 1}], "broken")
    start = time.monotonic()
    assert watched("emit({'row': 1}); time.sleep(60)", patience=1.0)[:2] == ("stuck", [{"row": 1}])
    assert watched("emit({'row': 1}); time.sleep(60)", until=1.0)[:2] == ("out of time", [{"row": 1}])
    assert time.monotonic() - start < 20


SANITIZED = """
print("========= COMPUTE-SANITIZER")
print("========= Invalid __global__ write of size 16 bytes")
print("=========     at move_rows+0x40")
print("=========     Saved host backtrace up to driver entry point")
print("=========         Host Frame: cuLaunchKernel in libcuda.so.1")
print("and the end of a long traceback")
raise SystemExit(9)
"""


def test_the_sanitizers_words_are_kept():
    how, _, noise = watched(SANITIZED)
    assert (how, noise) == ("crashed", "Invalid __global__ write of size 16 bytes / at move_rows+0x40")


def test_tools_are_found_off_the_path(monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert supervise.cuda_tool("compute-sanitizer") in (None, "/usr/local/cuda/bin/compute-sanitizer")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert supervise.cuda_tool("compute-sanitizer") == str(tool)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tool.parent))
    assert supervise.cuda_tool("compute-sanitizer") == str(tool)


def test_a_build_that_takes_too_long_leaves_nobody_behind(tmp_path):
    """As setup.py starts it: ninja goes on when its parent is killed, and its compilers are in groups of their own."""
    (tmp_path / "build.ninja").write_text(
        "rule slow\n  command = touch begun && sleep 2 && touch $out\nbuild ended: slow\n"
    )
    code = f"import ninja, subprocess; subprocess.check_call([ninja.BIN_DIR + '/ninja', '-C', {str(tmp_path)!r}])"
    assert supervise.run_within([sys.executable, "-c", code], 1.0) == (None, "")
    assert (tmp_path / "begun").exists(), "ninja had not begun: the test says nothing"
    time.sleep(2)
    assert not (tmp_path / "ended").exists()
    assert supervise.run_within([sys.executable, "-c", "print(1); raise SystemExit(3)"], 30) == (3, "1\n")


def test_only_this_gpus_machine_code_is_built(monkeypatch, tmp_path, capsys):
    asked = []

    def built(command, seconds, environment):
        asked.append((seconds, environment))
        return 1, "FAILED: x.o\nfatal error: no such header\nninja: build stopped\n"

    monkeypatch.setattr(gpu, "run_within", built)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "2.11.0 13.0 9\n"))
    why, architecture = gpu.look_for_gpu()
    run = gpu.Run(gpu.parse([f"--out={tmp_path}", "--quick"]), architecture)
    run.build()
    assert why is None
    assert asked[0][1] == {"VKERNELS_CUDA_ARCHS": "90a"}
    assert 85 < asked[0][0] <= 90
    assert "no such header" in run.found["lost"][0]["why"]


def test_a_tree_without_history_is_measured_too(monkeypatch, tmp_path):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(gpu.subprocess, "run", no_git)
    assert gpu.Run(gpu.parse([f"--out={tmp_path}"])).found["environment"]["commit"] == "unknown"


def test_a_broken_case_costs_one_case():
    """The process dies inside case b: a stays measured, b has failed, c gets a new process; time ends inside d."""
    started = []

    def start(command, *, on_report, **_):
        skipped = [x.removeprefix("--skip=") for x in command if x.startswith("--skip=")]
        started.append(skipped)
        on_report({"plan": ["a", "b", "c", "d", "e"]})
        for name in [x for x in "abcde" if x not in skipped]:
            on_report({"begin": name})
            if name == "b":
                return "crashed", "an illegal memory access"
            if name == "d":
                return "out of time", ""
            on_report({"row": name})
            on_report({"end": name})

    rows = []
    lost = supervise.run_stage("race", [], until=0, patience=1, on_report=rows.append, start=start)
    assert started == [[], ["a", "b"]]
    assert rows == [{"row": "a"}, {"row": "c"}]
    assert [(x["id"], x["status"]) for x in lost] == [("b", "failed"), ("d", "skipped"), ("e", "skipped")]
    assert "crashed: an illegal memory access" in lost[0]["why"]


def test_who_broke_a_case_is_left_out_of_it():
    """A rival compiles for ever, then our `cuda` crashes: the case ends with Triton's row, and one failure."""
    started = []

    def start(command, *, on_report, **_):
        without = json.loads(next((x for x in command if x.startswith("--without=")), "=null").split("=", 1)[1])
        started.append(without)
        on_report({"plan": ["a"]})
        on_report({"begin": "a"})
        absent = (without or {}).get("a", {})
        if "Flex" not in (without or {}).get("*", {}):
            on_report({"busy": "Flex", "ours": False})
            return "stuck", "compiling"
        for backend in ("triton", "cuda"):
            if backend not in absent:
                on_report({"busy": backend, "ours": True})
                if backend == "cuda":
                    return "crashed", "illegal"
                on_report({"backend": backend})
        on_report({"end": "a"})
        return "ended", ""

    rows = []
    lost = supervise.run_stage("race", [], until=0, patience=1, on_report=rows.append, start=start)
    assert rows == [{"backend": "triton"}]
    assert [(x["id"], x["status"], x["why"]) for x in lost] == [("a, cuda", "failed", "its process crashed: illegal")]
    assert [sorted((without or {}).get("a", {})) for without in started] == [[], [], ["cuda", "triton"]]
    assert started[2]["*"]["Flex"] == "its process said nothing for 1 s: compiling"


def test_one_backend_that_raises_costs_its_own_rows(monkeypatch):
    race = next(r for r in own_races(small=True) if r.op == "apply_rope")
    ours = Problem.ours

    def raises():
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("benchmarks.gpu.race.backends", lambda spec, device: ["reference", "cpu"])
    monkeypatch.setattr(Problem, "ours", lambda self, name=None: raises if name == "reference" else ours(self, name))
    said = []
    track = Track("cpu", None, LIMITS, 0.0, busy=lambda who, ours: said.append((who, ours)))
    rows = list(race_unit(units(race)[0], track, {"Hugging Face eager": "it said nothing"}))
    assert [(row["backend"], row["status"]) for row in rows] == [("reference", "failed"), ("cpu", "warmed")]
    assert rows[0]["why"] == "RuntimeError: no kernel image is available"
    assert {"name": "Hugging Face eager", "why": "it said nothing"} in rows[1]["rivals"]
    assert said[-2:] == [("reference", True), ("cpu", True)]
    assert {ours for _, ours in said[:-2]} == {False}


def test_several_ops_are_chosen():
    assert gpu.parse(["--op", "attention", "kv_append"]).op == ["attention", "kv_append"]
    said = []
    worker.race(
        worker.parse(["race", "--device=cpu", "--small", "--warm", "--op=apply_rope", "--op=lower_mask"]), said.append
    )
    assert {row["op"] for row in said if "op" in row} == {"apply_rope", "lower_mask"}
    assert not [row for row in said if row.get("status") == "failed"]


def test_a_rival_that_hung_is_not_waited_for_again():
    said = []
    without = json.dumps({"*": {"Hugging Face eager": "it hung"}})
    options = ["race", "--device=cpu", "--small", "--warm", "--op=apply_rope", f"--without={without}"]
    worker.race(worker.parse(options), said.append)
    rows = [row for row in said if row.get("status") == "warmed"]
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert all({"name": "Hugging Face eager", "why": "it hung"} in row["rivals"] for row in rows)
    assert "Hugging Face eager" not in [row.get("busy") for row in said]


def test_a_failure_is_the_exit_status(monkeypatch, tmp_path):
    def fails(stage, arguments, **_):
        return [{"stage": stage, "id": "x", "status": "failed", "why": "it broke"}]

    monkeypatch.setattr(gpu, "run_stage", fails)
    assert gpu.Run(gpu.parse(["--device=cpu", "--no-build", "--quick", f"--out={tmp_path}"])).all() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=supervise.ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "make gpu: no CUDA GPU: torch" in run.stderr


def test_the_readme_says_what_is_measured(tmp_path):
    assert "No GPU number has been measured" in gpu_numbers(tmp_path)
