"""python -m vkernels  info | check | table | compile | tune | bench | explain"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time

import torch

import vkernels
from vkernels.dispatch import Backend
from vkernels.library import INTERPRETED, cuda_missing, cuda_why_not, native, native_missing, triton_why_not
from vkernels.spec import OpSpec


def info(_: argparse.Namespace) -> int:
    """What is active, and for what is not, why."""
    from vkernels.spec import compiled_specs

    print(f"vkernels {vkernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    missing = native_missing()
    print("backend reference: active")
    if missing is None:
        c = native()
        print(f"backend cpu: active, {c.isa_active()} of {', '.join(c.isa_names())} (compiler {c.compiler()})")
        unusable = sorted(set(c.isa_names()) - set(c.isa_usable()))
        if unusable:
            print(f"  not usable on this processor: {', '.join(unusable)}")
        print(f"  threads: {c.num_threads()}, torch's own")
    else:
        print(f"backend cpu: not active: {missing}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = triton_why_not(torch.empty(0, device=device))
    ops = ", ".join(spec.name for spec in compiled_specs() if any(b.name == "triton" for b in spec.backends))
    state = f"not active: {reason}" if reason else "active on the GPU" if device == "cuda" else "active, interpreted"
    print(f"backend triton: {state}; ops so far: {ops}")
    reason = cuda_missing() or (cuda_why_not(torch.empty(0, device=device)) if device == "cuda" else None)
    ops = ", ".join(spec.name for spec in compiled_specs() if any(b.name == "cuda" for b in spec.backends))
    print(f"backend cuda: {f'not active: {reason}' if reason else 'active on the GPU'}; ops so far: {ops}")
    for name in ("VKERNELS_CPU_ISA", "TRITON_INTERPRET"):
        print(f"environment: {name}={os.environ.get(name) or '(unset)'}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Every op's cases against the reference on this machine."""
    from vkernels.spec import all_specs, devices_of
    from vkernels.testing.evidence import arguments as made
    from vkernels.testing.evidence import assert_outputs

    failures = 0
    for spec in all_specs():
        if arguments.op and spec.name not in arguments.op:
            continue
        for backend, device in [(b, device) for b in spec.backends for device in devices_of(b.name)]:
            passed, skipped = 0, []
            for case in spec.cases:
                reason = backend.why_not(spec.prepare(**made(case, torch.float32, device)))
                if reason is not None:
                    skipped.append(reason)
                    continue
                try:
                    assert_outputs(spec, backend.name, case, torch.float32, device)
                    passed += 1
                except AssertionError as error:
                    failures += 1
                    print(f"FAILED {spec.name} {backend.name} {device} {case.id}: {error}")
            note = f"; {len(skipped)} refused: {skipped[0]}" if skipped else ""
            print(f"{spec.name:20} {backend.name:10} {device:5} {passed} of {len(spec.cases)} cases{note}")
    return 1 if failures else 0


def support_table() -> str:
    """Markdown: op x backend, forward and backward, read off the specs. The same on a machine without a GPU."""
    from vkernels.spec import Maker, all_specs
    from vkernels.triton.launch import recording

    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

    def runs(spec: OpSpec, backend: Backend, dtype: torch.dtype) -> bool:
        with recording("sm80"):
            calls = [spec.prepare(**case.make(Maker(dtype))) for case in spec.cases]
            return dtype in spec.dtypes and any(backend.why_not(call) is None for call in calls)

    specs = all_specs()
    columns = list(dict.fromkeys(backend.name for spec in specs for backend in spec.backends))
    lines = [f"| op | {' | '.join(columns)} | gradients |", "|---" * (len(columns) + 2) + "|"]
    for spec in specs:
        served = {b.name: " ".join(short[x] for x in short if runs(spec, b, x)) for b in spec.backends}
        cells = [served.get(name) or "no" for name in columns]
        lines.append(f"| `{spec.name}` | {' | '.join(cells)} | {', '.join(spec.differentiable) or 'none'} |")
    return "\n".join(lines)


def table(_: argparse.Namespace) -> int:
    """The support table in Markdown, read off the specs."""
    print(support_table())
    return 0


def compile_kernels(arguments: argparse.Namespace) -> int:
    """Triton kernels compiled for chips that need not be here, with what decides their speed; 1 if one has a fault."""
    from vkernels.spec import compiled_specs
    from vkernels.triton.aot import survey

    if INTERPRETED:
        raise SystemExit("compile: TRITON_INTERPRET must be unset, or there is nothing to compile")
    header = ["kernel", "chip", "shape", "registers", "shared", "spills", "occupancy", "instructions", "faults"]
    rows, faulty = [], 0
    for spec in compiled_specs():
        if not arguments.op or spec.name in arguments.op:
            for arch in arguments.arch:
                for made, faults in survey(spec, spec.rows if arguments.rows else spec.shapes, arch):
                    used = " ".join(f"{name}:{count}" for name, count in made.instructions.items() if count)
                    numbers = [made.registers, made.shared, made.spills, f"{made.occupancy:.0%}"]
                    rows.append([made.kernel, arch, made.label, *map(str, numbers), used, "; ".join(faults) or "none"])
                    faulty += bool(faults)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows)} compiled, {faulty} with faults")
    return 1 if faulty or not rows else 0


def tune_tiles(arguments: argparse.Namespace) -> int:
    """Measure the tiles' candidates on this GPU and write the best into the tables; 1 if nothing was measured."""
    from vkernels.spec import all_specs

    if not torch.cuda.is_available():
        raise SystemExit("tune: needs a CUDA GPU, and torch sees none")
    from vkernels.triton.launch import arch
    from vkernels.triton.tune import lines, tune, write

    here = arch(torch.device("cuda", torch.cuda.current_device()))
    if arguments.arch not in (None, here):
        raise SystemExit(f"tune: this GPU is {here}; tiles of {arguments.arch} are measured on one of those")
    chosen = [spec for spec in all_specs() if spec.shapes and (not arguments.op or spec.name in arguments.op)]
    end, measured = time.monotonic() + 60 * arguments.minutes, 0
    for i, spec in enumerate(chosen):
        now = time.monotonic()
        tuned = tune(spec, here, until=now + (end - now) / (len(chosen) - i))
        print("\n".join(lines(spec.name, tuned)) or f"{spec.name}: no time to measure a row", flush=True)
        if tuned:
            measured += len(tuned)
            print(f"written to {write(spec.name, here, tuned)}")
    return 0 if measured else 1


def bench(argv: list[str]) -> int:
    """What a call costs here, beside what one would otherwise write."""
    from vkernels.bench import cli

    return cli.main(argv)


def explain(argv: list[str]) -> int:
    """Which backend would run a call, why not the others, what it is cut to, and what it costs at the least."""
    from vkernels import explain_cli

    return explain_cli.main(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # it parses its own
        return bench(argv[1:])
    if argv[:1] == ["explain"]:
        return explain(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m vkernels", description=vkernels.__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    sub = commands.add_parser("info", help=info.__doc__)
    sub.set_defaults(run=info)
    sub = commands.add_parser("check", help=check.__doc__)
    sub.add_argument("--op", nargs="*")
    sub.set_defaults(run=check)
    sub = commands.add_parser("table", help=table.__doc__)
    sub.set_defaults(run=table)
    sub = commands.add_parser("compile", help=compile_kernels.__doc__)
    sub.add_argument("--op", nargs="*")
    sub.add_argument("--arch", nargs="*", default=["sm80", "sm90", "sm100"])
    sub.add_argument("--rows", action="store_true", help="the rows of tiles.json that no real size takes, instead")
    sub.set_defaults(run=compile_kernels)
    sub = commands.add_parser("tune", help=tune_tiles.__doc__)
    sub.add_argument("--op", nargs="*")
    sub.add_argument("--arch", help="a check: must be this GPU's")
    sub.add_argument("--minutes", type=float, default=10.0)
    sub.set_defaults(run=tune_tiles)
    commands.add_parser("bench", help=bench.__doc__)
    commands.add_parser("explain", help=explain.__doc__)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
