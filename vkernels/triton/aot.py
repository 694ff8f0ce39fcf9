"""Compile noted launches for chips that are not here, and read what came out: registers, shared memory, spills, and the
instructions that decide speed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vkernels.library import shared_limit
from vkernels.spec import Blank, OpSpec, Shape
from vkernels.testing.results import tensors_of
from vkernels.triton.launch import Launch, recording
from vkernels.triton.tiles import table

REGISTERS = 65536  # of one multiprocessor
THREADS = {"sm80": 2048, "sm86": 1536, "sm89": 1536, "sm90": 2048, "sm100": 2048}
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# What decides speed, by the first word of the machine instruction.
INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\.",
    "HMMA": r"\bHMMA\.",
    "UTCMMA": r"\bUTC\w*MMA",
    "load16": r"\bLDG\S*\.128\b|\bLDGSTS\S*\.128\b|\bUTMALDG",
    "store16": r"\bSTG\S*\.128\b|\bUTMASTG",
    "local": r"\b(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one chip."""

    kernel: str
    arch: str
    label: str
    registers: int
    shared: int  # bytes
    spills: int  # bytes of local memory a thread holds
    warps: int
    instructions: dict[str, int]

    @property
    def occupancy(self) -> float:
        """Share of the chip's threads that can be resident, by registers and shared memory."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (max(self.registers, 16) * threads)
        by_shared = shared_limit(self.arch) // self.shared if self.shared else 32
        return min(by_registers, by_shared, THREADS[self.arch] // threads, 32) * threads / THREADS[self.arch]

    @property
    def tensor_cores(self) -> int:
        return sum(self.instructions[name] for name in ("HGMMA", "HMMA", "UTCMMA"))


def specialisation(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(signature, constants, attributes) as Triton's own launcher derives them from the arguments' values."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default if parameter.has_default else None)
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and free:
            signature[parameter.name], constants[(i,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def key(launch: Launch) -> str:
    """Equal for launches that one compilation serves."""
    return repr((launch.name, *specialisation(launch), sorted(launch.options.items())))


def compile_launch(launch: Launch, arch: str, label: str = "") -> Compiled:
    """Compile for `arch` (sm80, sm90, ...) and read the machine code."""
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel: Any = triton.compile(source, target=GPUTarget("cuda", int(arch[2:]), 32), options=dict(launch.options))
    registers, spills, assembly = read_cubin(kernel.asm["cubin"])
    return Compiled(
        kernel=launch.name,
        arch=arch,
        label=label,
        registers=registers,
        shared=kernel.metadata.shared,
        spills=spills,
        warps=kernel.metadata.num_warps,
        instructions={name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()},
    )


def launches(spec: OpSpec, shapes: Sequence[Shape], arch: str) -> Iterator[tuple[Shape, torch.dtype, list[Launch]]]:
    """What calls of an op would launch on `arch`, backward included."""
    for shape in shapes:
        for dtype in shape.dtypes:
            with recording(arch) as noted:
                kwargs = shape.make(Blank(dtype))
                leaves = [kwargs[name] for name in spec.differentiable if kwargs.get(name) is not None]
                leaves = [x.requires_grad_() for x in leaves if isinstance(x, torch.Tensor) and shape.gradients]
                outputs = [x for x in tensors_of(spec, spec.fn(**kwargs, backend="triton")) if x.requires_grad]
                if leaves and outputs:
                    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
            yield shape, dtype, noted


def survey(spec: OpSpec, shapes: Sequence[Shape], arch: str) -> list[tuple[Compiled, list[str]]]:
    """Every kernel that calls of an op need on `arch`, compiled once per specialisation, with its faults."""
    found, seen = [], set()
    for shape, dtype, noted in launches(spec, shapes, arch):
        for launch in noted:
            if (identity := key(launch)) not in seen:
                seen.add(identity)
                label = f"{shape.id} {str(dtype).removeprefix('torch.')}"
                found.append(judged(launch, arch, table(spec.name)[launch.name]["bound"], shape, label))
    return found


def judged(launch: Launch, arch: str, bound: str, shape: Shape, label: str = "") -> tuple[Compiled, list[str]]:
    """A launch compiled, and its faults; not to compile is one."""
    try:
        made = compile_launch(launch, arch, label)
    except Exception as failure:  # of Triton, LLVM or ptxas, whose classes differ from version to version
        nothing = dict.fromkeys(INSTRUCTIONS, 0)
        made = Compiled(launch.name, arch, label, 0, 0, 0, launch.options.get("num_warps", 4), nothing)
        error: BaseException = failure
        while error.__cause__ is not None:  # of functions a kernel calls, the innermost
            error = error.__cause__
        return made, [f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-120:]}"]
    return made, faults(made, bound, shape)


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of local memory, machine code) of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [_tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:400]
    return int(usage[1]), int(usage[2]), text


def faults(made: Compiled, bound: str, shape: Shape) -> list[str]:
    """What is wrong with a kernel compiled for `shape`, in sentences; empty when nothing is."""
    found, used = [], made.instructions
    if made.shared > (limit := shared_limit(made.arch)):
        found.append(f"shared memory {made.shared} exceeds the {limit} bytes of {made.arch}")
    if made.spills > shape.spills or (used["local"] and not shape.spills):
        found.append(f"{made.spills} bytes of local memory, {used['local']} accesses to it")
    due = {"sm80": "HMMA", "sm90": "HMMA" if shape.hmma else "HGMMA"}.get(made.arch)
    tensor_cores_due = shape.tensor_cores and bound == "arithmetic"
    if tensor_cores_due and (made.tensor_cores == 0 or (due == "HGMMA" and used["HGMMA"] == 0)):
        found.append(f"no {due or 'tensor-core'} instruction")
    stores_due = bound == "bytes"  # a kernel bound by "reads" hardly writes
    if bound in ("bytes", "reads") and not (used["load16"] and (used["store16"] or not stores_due)):
        found.append(f"16-byte accesses missing: {used['load16']} loads, {used['store16']} stores")
    return found
