"""Builds vkernels._C with ninja: C++ always, one object per source and instruction set; CUDA where nvcc is. No torch.

`pip install .`, `pip install -e .` and `python setup.py build_ext --inplace` all come through here. Objects stay in
build/native, so a second build compiles only what changed. VKERNELS_SANITIZE=1 builds under AddressSanitizer and
UndefinedBehaviorSanitizer in a folder of its own. VKERNELS_CUDA=0 leaves the CUDA kernels out, VKERNELS_CUDA=1 fails
where they cannot be built, VKERNELS_CUDA_ARCHS=90a compiles them for that GPU alone (80,90a,ptx is all).
"""

import os
import platform
import re
import shutil
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

# -O3 buys temporal attention 6 %, for a third more of the build; baseline serves machines that have no speed to lose.
OPTIMISE = {isa: "-O2" if isa == "baseline" else "-O3" for isa in ISA_FLAGS}

# Machine code for what the kernels are written for, and PTX that the driver compiles for anything newer. All three come
# of one pass of the front end, two thirds of nvcc's time: no kernel asks for an instruction of sm_90 yet.
CUDA_TARGETS = {"80": "sm_80", "90a": "sm_90a", "ptx": "compute_80"}
CUDA_ARCHITECTURES = (os.environ.get("VKERNELS_CUDA_ARCHS") or ",".join(CUDA_TARGETS)).split(",")
if unknown := set(CUDA_ARCHITECTURES) - set(CUDA_TARGETS):
    raise SystemExit(f"VKERNELS_CUDA_ARCHS must name {', '.join(CUDA_TARGETS)}, got {', '.join(sorted(unknown))}")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode",
    f"arch=compute_80,code=[{','.join(CUDA_TARGETS[name] for name in CUDA_ARCHITECTURES)}]",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wno-psabi",
]
COMPILED_FOR = ", ".join("PTX for newer" if name == "ptx" else f"sm_{name}" for name in CUDA_ARCHITECTURES)


class Cuda:
    """nvcc and how to link what it compiles; `absent` is the sentence that says why not, else None."""

    def __init__(self, folder, compiler, sanitize):
        self.link, self.compile = [], []
        self.absent = self.look(folder, compiler, sanitize)
        wanted = os.environ.get("VKERNELS_CUDA", "")
        if self.absent and wanted == "1":
            raise SystemExit(f"VKERNELS_CUDA=1, but {self.absent}")
        print(f"CUDA: {self.absent or f'{self.version}; {COMPILED_FOR}'}", flush=True)

    def look(self, folder, compiler, sanitize):
        wanted = os.environ.get("VKERNELS_CUDA", "")
        if wanted == "0" or (sanitize and wanted != "1"):
            return "vkernels was built without CUDA kernels (VKERNELS_CUDA=0)"
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
        nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            return "vkernels was built without CUDA kernels (nvcc was not found)"
        host = compiler.split()[-1]  # without ccache
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        self.version = " ".join(re.findall(r"release ([\d.]+)", version)[:1]) or "unknown version"
        self.compile = [nvcc, "-ccbin", host, *NVCC_FLAGS]
        # An nvcc that knows the architectures, and a host compiler it accepts: asked once, the answer is kept.
        probe, answer = folder / "probe.cu", folder / "probe.txt"
        question = f"{version}\n{self.compile}\n"
        if not answer.exists() or not answer.read_text().startswith(question):
            probe.write_text("__global__ void probe() {}\n")
            run = [*self.compile, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
            tried = subprocess.run(run, capture_output=True, text=True)
            libraries = subprocess.run([*run, "--dryrun"], capture_output=True, text=True).stderr
            found = re.findall(r'"(-L[^"]+)"', "".join(re.findall(r"LIBRARIES=(.*)", libraries)))
            failed = (
                next(iter((tried.stderr + tried.stdout).strip().splitlines()), "it failed") if tried.returncode else ""
            )
            answer.write_text(question + failed + "\n" + "\n".join(found))
        failed, *found = answer.read_text().removeprefix(question).split("\n")
        if failed:
            return f"vkernels was built without CUDA kernels (nvcc {self.version} could not compile: {failed})"
        self.link = [*found, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return None

    def count(self, objects):
        """The kernels in the objects: every instantiation has one stub on the host."""
        names = set()
        for path in objects.glob("*_cuda.cu.o"):
            listing = subprocess.run(["nm", str(path)], capture_output=True, text=True).stdout
            names |= set(re.findall(r"__device_stub__(\w+?)(?:E\d+__\w+)?$", listing, re.MULTILINE))
        return len(names)


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        sanitize = os.environ.get("VKERNELS_SANITIZE") == "1"
        objects = ROOT / "build" / ("native-sanitize" if sanitize else "native")
        objects.mkdir(parents=True, exist_ok=True)
        # Not resolve(): pip builds in a temporary folder that must be the one setuptools collects from.
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)

        compiler = os.environ.get("CXX", "g++")
        cuda = Cuda(objects, compiler, sanitize)
        (objects / "build.ninja").write_text(self.ninja_file(compiler, cuda, output, sanitize))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.check_call([Path(ninja.BIN_DIR) / "ninja", "-C", str(objects), *(["-j", jobs] if jobs else [])])
        if not cuda.absent:
            print(f"CUDA: {cuda.count(objects)} kernels, each for {COMPILED_FOR}", flush=True)

    @staticmethod
    def ninja_file(compiler, cuda, output, sanitize):
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
        link += cuda.link
        headers = f"-I{ROOT / 'csrc'} -I{ROOT / 'csrc' / 'include'}"

        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule cuda",
            f"  command = {' '.join(cuda.compile)} {headers} -MD -MF $out.d -c $in -o $out",
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

        if not cuda.absent:  # first, as they take longest
            for source in sorted((ROOT / "csrc").rglob("*.cu")):
                outputs.append("-".join(source.relative_to(ROOT / "csrc").parts) + ".o")
                lines.append(f"build {outputs[-1]}: cuda {escape(source)}")
        sentence = re.sub(r"[^\w .,:;()/=+-]", " ", cuda.absent or "")
        absent = f"-D'VK_CUDA_ABSENT=\"{sentence}\"'" if cuda.absent else ""
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            stem = "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
            if source.stem.endswith("_cpu"):
                for isa, isa_flags in ISA_FLAGS.items():
                    level = "-O1" if sanitize else OPTIMISE[isa]
                    compile_one(source, f"{stem}.{isa}.o", " ".join([level, f"-DVK_ISA={isa}", *isa_flags]))
            elif source.parent.name == "cuda" and cuda.absent:
                continue
            else:  # bindings and bookkeeping: nothing to gain from optimising, half of the build to lose
                compile_one(source, f"{stem}.o", f"-O1 {absent if stem == 'module' else ''}")
        lines.append(f"build {escape(output)}: link {' '.join(outputs)}")
        return "\n".join(lines) + "\n"


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("vkernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
