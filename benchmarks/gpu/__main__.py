"""python -m benchmarks.gpu [--quick] [--out FOLDER] [--tune]: build, prove, measure; the table last.

Ends within 9 minutes, 3 with --quick. Every stage runs in processes of its own and has a deadline; what was found is
written after each, so that a run that is killed keeps it. Exit status 1 if anything failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu import preferences, report
from benchmarks.gpu.supervise import ROOT, run_stage

# Seconds from the start by which a stage has ended: build, machine, proof (and sanitizer), tune, race.
DEADLINES = {"build": 150, "machine": 180, "proof": 310, "tune": 310, "race": 515}
QUICK = {"build": 60, "machine": 75, "proof": 115, "tune": 115, "race": 165}
TUNING = {"proof": 250, "tune": 350}


def has_gpu() -> str | None:
    """None where torch sees a CUDA GPU, else the sentence. Asked of another process: this one stays clear of CUDA."""
    asked = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", asked], capture_output=True, text=True)
    if told.returncode:
        return f"torch cannot be imported by {sys.executable}: {told.stderr.strip().splitlines()[-1:]}"
    torch_version, cuda, available = told.stdout.split()[-3:]
    if available != "True":
        return f"no CUDA GPU: torch {torch_version} (CUDA {cuda}) sees none; the CPU's numbers are `make bench`"
    return None


class Run:
    """One run: what it found so far, and the time it has."""

    def __init__(self, arguments: argparse.Namespace, clock: Callable[[], float] = time.monotonic):
        self.arguments, self.clock, self.began = arguments, clock, clock()
        self.deadlines = (QUICK if arguments.quick else DEADLINES) | (TUNING if arguments.tune else {})
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        self.found: dict[str, Any] = {
            "environment": {"date": date.today().isoformat(), "commit": commit.stdout.strip() or "unknown"},
            "ceilings": {"copy_gb_per_s": 4300.0, "bf16_tflop_per_s": 790.0, "measured": False},
            "proof": [],
            "sanitizer": [],
            "tuned": [],
            "race": [],
            "lost": [],
        }

    def until(self, stage: str) -> float:
        return self.began + self.deadlines[stage]

    def left(self, stage: str) -> float:
        return self.until(stage) - self.clock()

    def store(self) -> Path:
        return report.store(self.found, self.arguments.out.resolve())

    def lose(self, stage: str, why: str, status: str = "skipped") -> None:
        self.found["lost"].append({"stage": stage, "id": stage, "status": status, "why": why})
        print(f"{stage}: {why}", flush=True)

    # ---- stages ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """The native library, in place, with what is there."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(self.left("build"), 1))
        except subprocess.TimeoutExpired:
            self.lose("build", "the native library was not built in time; Triton's kernels need none", "failed")
            return
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            self.lose("build", f"the native library could not be built: {' '.join(last)[:300]}", "failed")

    def machine(self) -> None:
        def listen(said: dict[str, Any]) -> None:
            self.found["environment"] |= said.get("facts", {})
            self.found["ceilings"] = said.get("ceilings", self.found["ceilings"])

        self.found["lost"] += self._stage("machine", [], listen, patience=60)
        facts, limits = self.found["environment"], self.found["ceilings"]
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        copy, product = limits["copy_gb_per_s"], limits["bf16_tflop_per_s"]
        print(f"copy {copy:.0f} GB/s, bf16 product {product:.0f} TFLOP/s", flush=True)

    def proof(self) -> None:
        """Ops side by side, a process each, because compiling is what takes the time; the sanitizer beside them."""
        ops = self.arguments.op or _ops()
        workers = max(1, min(2 * len(ops) + 1, (os.cpu_count() or 2) - 1))
        share = f"--memory={0.9 / workers:.3f}"
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self._prove, [f"--op={op}", share, *self._size()]) for op in ops]
            jobs.append(pool.submit(self._sanitize))
            jobs += [pool.submit(self._warm, [f"--op={op}", share]) for op in ops if not self.arguments.small]
            for job in jobs:
                job.result()
                self.store()

    def _warm(self, options: list[str]) -> None:
        """Compile what will be raced, while compiling disturbs nobody. What goes wrong here is said by the race."""
        self._stage("race", ["--warm", *options], lambda row: None, patience=90)

    def _size(self) -> list[str]:
        return [] if self.arguments.quick or self.arguments.small else ["--shapes"]

    def _prove(self, options: list[str]) -> None:
        self.found["lost"] += self._stage("proof", options, self.found["proof"].append, patience=90)

    def _sanitize(self) -> None:
        tool = shutil.which("compute-sanitizer")
        if self.arguments.quick:
            self.lose("sanitizer", "left out of a quick run")
        elif tool is None:
            self.lose("sanitizer", "compute-sanitizer is not on the path")
        else:
            # torch's caching allocator would hide accesses outside a tensor from the tool.
            before = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "9"]
            found = self.found["sanitizer"]
            self.found["lost"] += self._stage("proof", ["--few"], found.append, patience=120, before=before)

    def tune(self) -> None:
        if self.arguments.tune:
            minutes = max(self.left("tune"), 1) / 60
            command = [sys.executable, "-W", "ignore", "-m", "vkernels", "tune", "--minutes", f"{minutes:.2f}"]
            try:
                done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=minutes * 60 + 15)
            except subprocess.TimeoutExpired:
                self.lose("tune", "no time was left")
                return
            self.found["tuned"] = done.stdout.splitlines()
            print(done.stdout, flush=True)
            if done.returncode:
                self.lose("tune", done.stderr.strip()[-300:], "failed")

    def race(self) -> None:
        def listen(row: dict[str, Any]) -> None:
            self.found["race"].append(row)
            self.store()
            if row["status"] == "measured":
                print("  ".join(report.cells(row, self.found["environment"].get("gpu", ""))), flush=True)

        limits = json.dumps({name: self.found["ceilings"][name] for name in ("copy_gb_per_s", "bf16_tflop_per_s")})
        options = [f"--limits={limits}", f"--seconds={0.1 if self.arguments.quick else 0.3}"]
        options += ["--small"] if self.arguments.small else []
        options += [f"--op={op}" for op in self.arguments.op]
        self.found["lost"] += self._stage("race", options, listen, patience=75)

    def prefer(self) -> None:
        """What the race says about backends of ours against one another, for the dispatcher."""
        if self.arguments.device == "cuda" and not self.arguments.small:
            chip = self.found["environment"].get("sm", "unknown").replace("_", "")
            count = preferences.update(chip, self.found["race"])
            print(f"{count} kinds of calls ranked in {preferences.FILE.relative_to(ROOT)}", flush=True)

    def _stage(self, stage: str, options: list[str], listen: Callable[[dict], None], **more: Any) -> list[dict]:
        device = f"--device={self.arguments.device}"
        return run_stage(stage, [device, *options], until=self.until(stage), on_report=listen, **more)

    def all(self) -> int:
        for stage in (self.build, self.machine, self.proof, self.tune, self.race, self.prefer):
            if stage.__name__ == "build" and self.arguments.no_build:
                continue
            print(f"-- {stage.__name__}, {self.clock() - self.began:.0f} s", flush=True)
            try:
                stage()
            except Exception as error:
                self.lose(stage.__name__, f"{type(error).__name__}: {error}", "failed")
            path = self.store()
        print(report.summary(self.found))
        print(report.table(self.found))
        print(f"stored in {path}, {self.clock() - self.began:.0f} s", flush=True)
        return 1 if report.failures(self.found) else 0


def _ops() -> list[str]:
    """The ops by their folders: this process imports no torch."""
    return sorted(p.parent.name for p in (ROOT / "vkernels" / "ops").glob("*/spec.py"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 minutes instead of 9")
    parser.add_argument("--tune", action="store_true", help="also measure tiles and write tiles.json")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--op", nargs="*", default=[])
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the same programs without a GPU"
    )
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--no-build", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.device == "cuda" and (why := has_gpu()):
        print(f"make gpu: {why}", file=sys.stderr)
        return 2
    return Run(arguments).all()


if __name__ == "__main__":
    sys.exit(main())
