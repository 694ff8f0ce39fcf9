"""Builds vkernels._C with ninja: C++ always, no torch, one object per source and instruction set.

`pip install .`, `pip install -e .` and `python setup.py build_ext --inplace` all come through here. Objects stay in
build/native, so a second build compiles only what changed. VKERNELS_SANITIZE=1 builds under AddressSanitizer and
UndefinedBehaviorSanitizer in a folder of its own.
"""

import os
import platform
import subprocess
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"],
    }


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        sanitize = os.environ.get("VKERNELS_SANITIZE") == "1"
        objects = ROOT / "build" / ("native-sanitize" if sanitize else "native")
        objects.mkdir(parents=True, exist_ok=True)
        # Not resolve(): pip builds in a temporary folder that must be the one setuptools collects from.
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)

        (objects / "build.ninja").write_text(self.ninja_file(objects, output, sanitize))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call([Path(ninja.BIN_DIR) / "ninja", "-C", str(objects), *(["-j", jobs] if jobs else [])])

    @staticmethod
    def ninja_file(objects, output, sanitize):
        includes = [ROOT / "csrc", ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_path("include")]
        flags = [
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-Wno-unused-function",
            "-Wno-maybe-uninitialized",
        ]
        flags += ["-g", "-fsanitize=address,undefined"] if sanitize else ["-fno-math-errno"]
        # Vector code must keep -inf and NaN apart from numbers, so no -ffast-math.
        flags += [f"-isystem{path}" if "csrc" not in str(path) else f"-I{path}" for path in map(str, includes)]
        link = ["-shared", *(["-fsanitize=address,undefined"] if sanitize else ["-s"])]
        compiler = os.environ.get("CXX", "g++")

        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            f"  command = $cxx @$out.rsp -o $out {' '.join(link)}",
            "  rspfile = $out.rsp",
            "  rspfile_content = $in",
        ]
        outputs = []

        def compile_one(source, name, isa=""):
            outputs.append(name)
            lines.append(f"build {name}: compile {escape(source)}\n  isa = {isa}")

        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            stem = "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
            if source.stem.endswith("_cpu"):
                for isa, isa_flags in ISA_FLAGS.items():
                    level = "-O1" if sanitize else "-O3"
                    compile_one(source, f"{stem}.{isa}.o", " ".join([level, f"-DVK_ISA={isa}", *isa_flags]))
            else:  # bindings and bookkeeping: nothing to gain from optimising, half of the build to lose
                compile_one(source, f"{stem}.o", "-O1")
        lines.append(f"build {escape(output)}: link {' '.join(outputs)}")
        return "\n".join(lines) + "\n"


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("vkernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
