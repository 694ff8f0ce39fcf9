"""The CUDA kernels, compiled by g++ against the twins of csrc/include/vkernels/device/ and run on CPU tensors by the
emulator of tests/cuda/ (docs/cuda-on-cpu.md). Test code: built into build/emulated on first use, never shipped.

`install()` gives the `cuda` backend this library for CPU tensors, so every derived test covers the CUDA kernels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from vkernels import library

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = "VKERNELS_TESTED_FROM" in os.environ  # make sanitize
FOLDER = ROOT / "build" / ("emulated-sanitize" if SANITIZED else "emulated")
NAME = "vkernels_emulated"


def ninja_file(output: str) -> str:
    import pybind11

    includes = [ROOT / "csrc", ROOT / "csrc/include", ROOT / "tests/cuda"]
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function"
    sanitize = "-fsanitize=address,undefined" if SANITIZED else ""
    paths = " ".join([*(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)])
    lines = [
        f"flags = {flags} {sanitize} {paths}",
        "rule compile",
        f"  command = {os.environ.get('CXX', 'g++')} $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'g++')} $in -o $out -shared {sanitize}",
    ]
    sources = [*(ROOT / "tests/cuda").glob("*.cpp"), *(ROOT / "csrc").rglob("*_cuda.cu")]
    sources.append(ROOT / "csrc/cuda/bindings.cpp")
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {str(source).replace(' ', '$ ')}")
    return "\n".join([*lines, f"build {output}: link {' '.join(objects)}", ""])


def build() -> Path:
    """Compile what changed; the library."""
    import ninja

    FOLDER.mkdir(parents=True, exist_ok=True)
    output = f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    text, file = ninja_file(output), FOLDER / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", str(FOLDER)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile with g++:\n{done.stdout}{done.stderr}")
    return FOLDER / output


class Emulated:
    """The native functions, each allowed to touch the tensors of its call and nothing else."""

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def run(*arguments: Any) -> Any:
            self.module.allow([a for a in arguments if isinstance(a, tuple) and len(a) == 5])
            try:
                return function(*arguments)
            finally:
                self.module.allow([])

        return run if name.endswith("_cuda") else function


def install() -> None:
    """Load the library, building it first; where that is impossible, the `cuda` backend keeps its refusal."""
    compiler = (os.environ.get("CXX") or "g++").split()[-1]
    if shutil.which(compiler) is None or not (find_spec("ninja") and find_spec("pybind11")):
        return
    path = build()
    spec = spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    library.emulator = Emulated(module)
