"""python -m benchmarks.gpu [--quick] [--out FOLDER] [--tune]: build, prove, measure; the table last.

Ends within 9 minutes, 3 with --quick. Every stage runs in processes of its own and has a deadline; what was found is
written after each, so that a run that is killed keeps it. Exit status 1 if anything failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu import preferences, report
from benchmarks.gpu.supervise import ROOT, Shares, cuda_tool, run_stage, run_within

# Seconds from the start by which a stage has ended: build, machine, proof (and sanitizer), tune, race.
DEADLINES = {"build": 150, "machine": 180, "proof": 310, "tune": 310, "race": 515}
QUICK = {"build": 90, "machine": 105, "proof": 135, "tune": 135, "race": 172}
TUNING = {"proof": 250, "tune": 350}

# Parts of the GPU's memory: of a process with toy sizes, of one that compiles what is raced, and of an op's real sizes
# with float64 beside them: attention's has a matrix of 8,192 x 8,192 per head. It comes last and fits beside those that
# still compile.
SMALL_SHARE, WARM_SHARE, REAL_SHARE = 0.015, 0.028, 0.05
LARGE_SHARE = {"attention": 0.65, "divided_attention": 0.15}

# What setup.py compiles for a GPU of that generation; the driver compiles PTX for what is newer.
ARCHITECTURES = {8: "80", 9: "90a"}


def look_for_gpu() -> tuple[str | None, str]:
    """(the sentence where torch sees no CUDA GPU, what setup.py should compile for). Asked of another process: this one
    stays clear of CUDA."""
    asked = """
import torch
major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
print(torch.__version__, torch.version.cuda, major)
"""
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", asked], capture_output=True, text=True)
    if told.returncode:
        return f"torch cannot be imported by {sys.executable}: {told.stderr.strip().splitlines()[-1:]}", ""
    torch_version, cuda, major = told.stdout.split()[-3:]
    if major == "0":
        return f"no CUDA GPU: torch {torch_version} (CUDA {cuda}) sees none; the CPU's numbers are `make bench`", ""
    return None, ARCHITECTURES.get(int(major), "ptx")


class Run:
    """One run: what it found so far, and the time it has."""

    def __init__(self, arguments: argparse.Namespace, architecture: str = "", began: float | None = None):
        self.arguments, self.architecture = arguments, architecture
        self.began = time.monotonic() if began is None else began
        self.deadlines = (QUICK if arguments.quick else DEADLINES) | (TUNING if arguments.tune else {})
        self.found: dict[str, Any] = {
            "environment": {"date": date.today().isoformat(), "commit": _commit()},
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
        return self.until(stage) - time.monotonic()

    def store(self) -> Path:
        return report.store(self.found, self.arguments.out.resolve())

    def lose(self, stage: str, why: str, status: str = "skipped") -> None:
        self.found["lost"].append({"stage": stage, "id": stage, "status": status, "why": why})
        print(f"{stage}: {why}", flush=True)

    # ---- stages ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """The native library, in place, with what is there, for this GPU alone."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        status, said = run_within(command, self.left("build"), {"VKERNELS_CUDA_ARCHS": self.architecture})
        if status is None:
            self.lose("build", "the native library was not built in time; Triton's kernels need none", "failed")
        elif status:
            lines = said.strip().splitlines()
            wrong = [line for line in lines if "error" in line.lower()] or lines[-1:]
            self.lose("build", f"the native library could not be built: {' / '.join(wrong)[:300]}", "failed")
        else:
            print("\n".join(line for line in said.splitlines() if line.startswith("CUDA: ")), flush=True)

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
        """Ops side by side, a process each, because compiling is what takes the time; the sanitizer beside them. Real
        sizes come as soon as there is memory for their float64 references."""
        ops = self.arguments.op or [*_ops(), "lower_mask"]
        shares = Shares()
        jobs: list[tuple[float, Callable[[list[str]], None], list[str]]] = []
        jobs += [(SMALL_SHARE, self._prove, [f"--op={op}"]) for op in ops]
        jobs.append((SMALL_SHARE, lambda _: self._sanitize(), []))
        if not self.arguments.small:
            jobs += [(WARM_SHARE, self._warm, [f"--op={op}"]) for op in ops]
            if not self.arguments.quick:
                real = {op: LARGE_SHARE.get(op, REAL_SHARE) for op in ops}
                jobs += [
                    (real[op], self._prove, [f"--op={op}", "--shapes"]) for op in sorted(real, key=real.__getitem__)
                ]

        def run(share: float, job: Callable[[list[str]], None], options: list[str]) -> None:
            with shares.taken(share):
                job([*options, f"--memory={share:.3f}"])

        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 1)) as pool:
            for started in [pool.submit(run, *job) for job in jobs]:
                started.result()
                self.store()

    def _warm(self, options: list[str]) -> None:
        """Compile what will be raced, while compiling disturbs nobody. What goes wrong here is said by the race."""
        self._stage("race", ["--warm", *options], lambda row: None, patience=90)

    def _prove(self, options: list[str]) -> None:
        self.found["lost"] += self._stage("proof", options, self.found["proof"].append, patience=90)

    def _sanitize(self) -> None:
        tool = cuda_tool("compute-sanitizer")
        if self.arguments.quick:
            self.lose("sanitizer", "left out of a quick run")
        elif tool is None:
            self.lose("sanitizer", "compute-sanitizer was not found (CUDA_HOME, PATH, /usr/local/cuda/bin)")
        else:
            # torch's caching allocator would hide accesses outside a tensor from the tool.
            before = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "9"]
            before += ["--report-api-errors", "no"]  # torch asks the driver for what may not be there
            found = self.found["sanitizer"]
            self.found["lost"] += self._stage("proof", ["--few"], found.append, patience=120, before=before)

    def tune(self) -> None:
        if self.arguments.tune:
            minutes = max(self.left("tune"), 1) / 60
            command = [sys.executable, "-W", "ignore", "-m", "vkernels", "tune", "--minutes", f"{minutes:.2f}"]
            status, said = run_within(command, minutes * 60 + 15)
            if status is None:
                self.lose("tune", "no time was left")
                return
            self.found["tuned"] = said.splitlines()
            print(said, flush=True)
            if status:
                self.lose("tune", said.strip()[-300:], "failed")

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
            print(f"-- {stage.__name__}, {time.monotonic() - self.began:.0f} s", flush=True)
            try:
                stage()
            except Exception as error:
                self.lose(stage.__name__, f"{type(error).__name__}: {error}", "failed")
            path = self.store()
        print(report.summary(self.found))
        print(report.table(self.found))
        print(f"stored in {path}, {time.monotonic() - self.began:.0f} s", flush=True)
        return 1 if report.failures(self.found) else 0


def _commit() -> str:
    """Short, or "unknown" where the tree came without its history or git is not installed."""
    try:
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def _ops() -> list[str]:
    """The ops by their folders: this process imports no torch."""
    return sorted(p.parent.name for p in (ROOT / "vkernels" / "ops").glob("*/spec.py"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 minutes instead of 9")
    parser.add_argument("--tune", action="store_true", help="also measure tiles and write tiles.json")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--op", nargs="*", action="extend", default=[])
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the same programs without a GPU"
    )
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--no-build", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments, began, architecture = parse(argv), time.monotonic(), ""
    if arguments.device == "cuda":
        why, architecture = look_for_gpu()
        if why:
            print(f"make gpu: {why}", file=sys.stderr)
            return 2
    return Run(arguments, architecture, began).all()


if __name__ == "__main__":
    sys.exit(main())
