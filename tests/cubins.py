"""Reads the machine code nvcc left in build/native: registers, local memory, instructions. `python tests/cubins.py`
prints it as a table."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

OBJECTS = Path(__file__).resolve().parent.parent / "build" / "native"

# What decides speed, by the machine instruction.
INSTRUCTIONS = {
    "load16": r"\bLDG\S*\.128\b",
    "store16": r"\bSTG\S*\.128\b",
    "copy16": r"\bLDGSTS\S*\.128\b",
    "tensor": r"\bHG?MMA\.",
    "local": r"\b(?:LDL|STL)\b",
    "barrier": r"\bBAR\.",
}


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, without namespaces and arguments
    arch: str
    registers: int
    stack: int  # bytes of local memory a thread holds
    instructions: dict[str, int]


@cache
def cuobjdump() -> str | None:
    """NVIDIA's tool, from the toolkit or from Triton, which brings its own."""
    if (tool := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")) is not None:
        return tool
    triton = find_spec("triton")
    bundled = triton and triton.origin and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled and bundled.exists() else None


def why_not() -> str | None:
    if not any(OBJECTS.glob("*_cuda.cu.o")):
        return "no CUDA kernel was built here (nvcc was not found)"
    return None if cuobjdump() else "cuobjdump is not installed (it comes with the CUDA toolkit and with Triton)"


def _short(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
    return re.sub(r"vk::|\(anonymous namespace\)::|device::|^void |\(.*\)$", "", name)


@cache
def kernels(op: str) -> tuple[Kernel, ...]:
    """Every kernel of `op`, for every architecture in its objects."""
    return tuple(kernel for path in sorted(OBJECTS.glob(f"{op}-*_cuda.cu.o")) for kernel in _kernels(path))


def _counts(code: str) -> dict[str, int]:
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ +(?:@\S+ +)?(\S+)", code, flags=re.MULTILINE))
    return {
        name: sum(count for opcode, count in opcodes.items() if re.search(pattern, opcode))
        for name, pattern in INSTRUCTIONS.items()
    }


def _kernels(path: Path) -> list[Kernel]:
    run = [cuobjdump(), "--dump-resource-usage", "--dump-sass", str(path)]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    found, usage, arch = [], {}, ""
    for part in re.split(r"(?=^arch = |^ Function |^\t\tFunction : )", text, flags=re.MULTILINE):
        if match := re.match(r"arch = (\w+)", part):
            arch = match[1]
        elif match := re.match(r" Function (\w+):\s+REG:(\d+) STACK:(\d+)", part):
            usage[arch, match[1]] = int(match[2]), int(match[3])
        elif match := re.match(r"\t\tFunction : (\w+)", part):
            found.append((arch, match[1], _counts(part)))
    return [Kernel(_short(name), arch, *usage[arch, name], counts) for arch, name, counts in found]


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(reason)
    for op in sorted({path.name.split("-")[0] for path in OBJECTS.glob("*_cuda.cu.o")}):
        for kernel in kernels(op):
            used = " ".join(f"{name}:{count}" for name, count in kernel.instructions.items() if count)
            print(f"{kernel.arch:8} {kernel.name:55} {kernel.registers:4} registers {kernel.stack:3} local  {used}")
