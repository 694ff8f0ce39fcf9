"""python -m benchmarks.gpu.worker STAGE: one stage in a process of its own; supervise.py starts and reads it."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import vkernels
from benchmarks.gpu.cases import own_races, races
from benchmarks.gpu.proof import backends, context_is_lost, masked, prove, prove_masks
from benchmarks.gpu.race import Track, race_unit, units
from benchmarks.gpu.supervise import ALWAYS, cuda_tool, emit
from vkernels.bench.clock import ceilings, timer_for
from vkernels.bench.rivals import reason
from vkernels.masks import spec as masks
from vkernels.ops.attention import spec as attention
from vkernels.spec import Case, OpSpec, compiled_specs

Report = Callable[[dict[str, Any]], None]


def machine(arguments: argparse.Namespace, report: Report = emit) -> None:
    """What this machine is, and its two ceilings."""
    cuda = arguments.device.startswith("cuda")
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if cuda else "none: CPU stand-in",
        "driver": _driver() if cuda else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "nvcc": _nvcc(),
        "python": platform.python_version(),
        "vkernels": vkernels.__version__,
    }
    if cuda:
        p = torch.cuda.get_device_properties(0)
        facts |= {"sm": f"sm_{p.major}{p.minor}", "processors": p.multi_processor_count}
        facts |= {"memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": round(p.L2_cache_size / 2**20, 1)}
    report({"facts": facts})
    size = {} if cuda else {"copy_bytes": 1 << 22, "size": 128}
    report({"ceilings": ceilings(arguments.device, timer_for(arguments.device), **size)})


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    run = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(run, capture_output=True, text=True).stdout.strip().split("\n")[0]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    tool = cuda_tool("nvcc")
    if tool is None:
        return "not found"
    return subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.strip().split("\n")[-1]


def limit_memory(arguments: argparse.Namespace) -> None:
    if arguments.memory and arguments.device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(arguments.memory)


def proof(arguments: argparse.Namespace, report: Report = emit) -> None:
    """Ops against float64; `--few`: three cases each, for a sanitizer that is slow; `--shapes`: their real sizes."""
    limit_memory(arguments)

    def chosen(spec: OpSpec) -> list[Case]:
        return list(spec.shapes if arguments.shapes else spec.cases[: 3 if arguments.few else None])

    for spec in compiled_specs():
        if arguments.op and spec.name not in arguments.op:
            continue
        if not backends(spec, arguments.device):
            report(
                {"stage": "proof", "op": spec.name, "id": spec.name, "status": "skipped", "why": "no GPU backend yet"}
            )
        elif spec is masks.SPEC:
            prove_masks([*chosen(spec), *masked(chosen(attention.SPEC))], arguments.device, arguments.skip, report)
        else:
            prove(spec, chosen(spec), arguments.device, arguments.skip, report)


def race(arguments: argparse.Namespace, report: Report = emit) -> None:
    """Every case, in the order of importance."""
    limit_memory(arguments)
    timer = None if arguments.warm else timer_for(arguments.device)
    track = Track(
        arguments.device, timer, json.loads(arguments.limits), arguments.seconds,
        busy=lambda who, ours: report({"busy": who, "ours": ours}),
    )  # fmt: skip
    chosen = own_races(small=True) if arguments.small else races()
    without = json.loads(arguments.without)
    cases = [case for case in chosen if not arguments.op or case.op in arguments.op]
    planned = {unit.name: unit for case in cases for unit in units(case)}
    report({"plan": list(planned)})
    for name, unit in planned.items():
        if name in arguments.skip:
            continue
        report({"begin": name})
        said = {"stage": "race", "op": unit.race.op, "id": unit.race.id}
        try:
            for row in race_unit(unit, track, without.get(ALWAYS, {}) | without.get(name, {})):
                report(said | row)
        except torch.cuda.OutOfMemoryError:
            report(said | {"status": "skipped", "why": "does not fit this GPU's memory"})
        except Exception as error:
            if context_is_lost(error):
                raise
            report(said | {"status": "failed", "why": reason(error)})
        if arguments.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()
        report({"end": name})


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("stage", choices=["machine", "proof", "race"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", nargs="*", action="extend", default=[])
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--without", default="{}", help="JSON: case -> who broke it before -> how")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--memory", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--limits", default='{"copy_gb_per_s": 1.0, "bf16_tflop_per_s": 1.0}')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    {"machine": machine, "proof": proof, "race": race}[arguments.stage](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
