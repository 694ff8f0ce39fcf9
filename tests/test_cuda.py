"""What is known about the CUDA kernels without a GPU: the build, and the machine code it made. Their numbers are
checked by test_every_op.py and tests/ops/, emulated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cubins import cuobjdump, kernels, why_not

import vkernels
from vkernels import library
from vkernels.library import cuda_missing, native_missing
from vkernels.spec import Blank, all_specs
from vkernels.testing.results import tensors_of
from vkernels.triton.launch import recording

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted({path.parent.name for path in (ROOT / "csrc").rglob("*_cuda.cu")})

# Kernels per op: a new instantiation is a decision, it costs every build its seconds. And registers above which fewer
# than two blocks fit a multiprocessor: blocks of 256 threads, or of 128 where products need them.
COUNT = {
    "apply_rope": 9,
    "attention": 49,
    "decode_attention": 10,
    "divided_attention": 56,
    "kv_append": 6,
    "qkv_prologue": 22,
    "rearrange": 23,
}
REGISTERS = {"attention": 255, "decode_attention": 255, "divided_attention": 255}


built = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def test_every_cuda_source_is_counted():
    assert sorted(COUNT) == OPS


def test_every_cuda_source_is_bound_and_registered():
    listed = (ROOT / "csrc/cuda/bindings.cpp").read_text()
    for op in OPS:
        assert f"{op}_cuda_bind::bind(m);" in listed
        spec = next(spec for spec in all_specs() if spec.name == op)
        names = [backend.name for backend in spec.backends]
        assert names.index("cuda") < names.index("triton")
        registered = [name for name, backend in library._direct if backend == "cuda" and name.startswith(op)]
        assert registered
        assert all("cuda" in getattr(torch.ops.vkernels, name).overloads() for name in registered)


@built
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_is_compiled_for_every_architecture(op):
    found = kernels(op)
    for arch in ("sm_80", "sm_90a"):
        assert len({kernel.name for kernel in found if kernel.arch == arch}) == COUNT[op], arch
    assert {kernel.arch for kernel in found} == {"sm_80", "sm_90a"}


@built
@pytest.mark.parametrize("op", OPS)
def test_nothing_spills(op):
    for kernel in kernels(op):
        assert kernel.stack == 0, kernel
        assert kernel.instructions["local"] == 0, kernel
        assert kernel.registers <= REGISTERS.get(op, 128), kernel


@built
def test_apply_rope_moves_16_bytes_at_a_time():
    """Two heads in flight: four loads before the first store. The kernel by elements is the one for everything else."""
    for kernel in kernels("apply_rope"):
        use = kernel.instructions
        if "staged" in kernel.name:
            assert use["copy16"] >= 1, kernel
            assert use["store16"] >= 1, kernel
        elif "true" in kernel.name:
            assert use["load16"] >= 4, kernel
            assert use["store16"] >= 4, kernel
        else:
            assert use["load16"] + use["store16"] == 0, kernel


@built
def test_attention_multiplies_on_tensor_cores():
    """Rows come in and go out 16 bytes at a time. A head of 64: two tiles of 16 rows with 64 keys are 128 products
    forward; with 16 queries at a time, and four products, they are 64."""
    for kernel in kernels("attention"):
        if "note_spans" in kernel.name:
            continue
        use = kernel.instructions
        assert use["copy16"] >= 24, kernel
        assert use["store16"] >= 8, kernel
        assert use["tensor"] >= 64, kernel


@built
def test_divided_attention_reads_rows_once():
    """Packed: a row of a head of 64 is two vectors to a lane, of q, k, v and, backward, of the gradient, both rows of a
    lane; no shared memory and no barrier. Tiled: copies past the registers."""
    for kernel in kernels("divided_attention"):
        use, chunks = kernel.instructions, int((re.findall(r", (\d)[,>]", kernel.name) or ["0"])[0])
        if kernel.name.startswith("packed") and "true" in kernel.name:  # turned: angles by 16 bytes, too
            assert use["load16"] >= (6 if "forward" in kernel.name else 8) * chunks + 4 * chunks, kernel
            assert use["barrier"] == 0, kernel
        elif kernel.name.startswith("packed_forward"):
            assert (use["load16"], use["tensor"], use["barrier"]) == (6 * chunks, 8 * chunks, 0), kernel
            assert kernel.registers <= 32 + 16 * chunks, kernel
        elif kernel.name.startswith("packed_backward<"):
            assert (use["load16"], use["tensor"], use["barrier"]) == (8 * chunks, 20 * chunks, 0), kernel
            assert kernel.registers <= 32 + 33 * chunks, kernel
        elif kernel.name.startswith("tiled"):
            assert use["copy16"] >= 6 * chunks, kernel
            assert use["store16"] >= 2 * chunks, kernel
            assert use["tensor"] >= 16 * chunks, kernel
            assert kernel.registers <= (168 if chunks == 2 else 255), kernel  # two blocks to a multiprocessor, or one


@built
def test_qkv_prologue_moves_16_bytes_at_a_time():
    """Three heads in flight: six loads before the first store. Layouts of 8 bytes or of elements have other kernels."""
    wide = [kernel for kernel in kernels("qkv_prologue") if ", 16, 1, 3>" in kernel.name]
    assert len(wide) == 2 * 9
    for kernel in wide:
        forward = kernel.name.startswith("prologue<")
        assert kernel.instructions["load16"] >= (6 if forward else 4), kernel
        assert kernel.instructions["store16"] >= (6 if forward else 0 if "stats" in kernel.name else 2), kernel


@built
def test_kv_append_moves_16_bytes_at_a_time():
    """Rows: two vectors of keys and of values under way. Codes: four tokens, and words leave four at a time."""
    for kernel in kernels("kv_append"):
        assert kernel.instructions["load16"] >= 4, kernel
        assert kernel.instructions["store16"] >= 4, kernel


@built
def test_rearrange_moves_16_bytes_at_a_time():
    """Units of 16 bytes; rows by vectors, four taps under way without a norm; tiles turned by vectors on both sides."""
    for kernel in kernels("rearrange"):
        use = kernel.instructions
        if kernel.name.startswith(("copy_runs<16>", "move_rows<16>")):
            assert min(use["load16"], use["store16"]) >= 2, kernel
        elif kernel.name.startswith(("finish_rows", "turn")):
            assert use["load16"] >= (4 if "false" in kernel.name else 2), kernel
            assert use["store16"] >= 1, kernel


@built
def test_decode_attention_reads_16_bytes_at_a_time_and_multiplies_on_tensor_cores():
    """A step over a head of 128 for 8 queries: 8 + 8 products for 16 rows, 16 + 16 for 32 codes. The codes' kernels
    hold the loop over rows twice, for bfloat16 and float16. Two blocks fit a multiprocessor unless there are 16
    queries."""
    for kernel in kernels("decode_attention"):
        use, sixteen = kernel.instructions, kernel.name.endswith("2>")
        rows = "decode_rows" in kernel.name
        assert use["copy16"] >= (12 if rows else 24), kernel
        assert use["load16"] - use["copy16"] >= 8, kernel  # parts of other splits
        assert use["tensor"] >= (16 if rows else 64) * (2 if sixteen else 1), kernel
        assert kernel.registers <= (255 if sixteen else 128), kernel


def forward_and_backward(spec, case, kwargs) -> None:
    if getattr(case, "gradients", kwargs.get("cache") is None):
        for leaf in [x for x in map(kwargs.get, spec.differentiable) if isinstance(x, torch.Tensor)]:
            leaf.requires_grad_()
    outputs = [x for x in tensors_of(spec, spec.fn(**kwargs, backend="cuda")) if x.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


CHIPS = ("sm80", "sm89")  # sm_80 gives a block 163 KiB of shared memory; sm_86, sm_89 and sm_120 give 99


def launches(spec) -> Iterator[tuple[str, str, str, int]]:
    """(chip that is not refused, case, kernel, bytes of shared memory) of what the CUDA kernels launch for derived
    cases and real sizes, forward and backward."""
    backend = next(backend for backend in spec.backends if backend.name == "cuda")
    for case in (*spec.cases, *spec.shapes, *spec.rows):
        for dtype in getattr(case, "dtypes", spec.dtypes):
            kwargs, served = case.make(Blank(dtype)), []
            for chip in CHIPS:
                with recording(chip):
                    if backend.why_not(spec.prepare(**kwargs)) is None:
                        served.append(chip)
            if served:
                with recording("sm80"):
                    noted = library.cuda_launches(partial(forward_and_backward, spec, case, kwargs))
                yield from ((chip, case.id, name, shared) for name, _, _, _, shared in noted for chip in served)


@pytest.mark.skipif(library.cuda_unbuilt() is not None, reason=str(library.cuda_unbuilt()))
@pytest.mark.parametrize("op", OPS)
def test_shared_memory_fits_every_chip_that_is_served(op):
    """What needs more than a chip gives is refused there in a sentence."""
    found = list(launches(next(spec for spec in all_specs() if spec.name == op)))
    assert found
    assert not [launch for launch in found if launch[3] > library.shared_limit(launch[0])]


def test_a_chip_with_little_shared_memory_is_told_so():
    spec = next(spec for spec in all_specs() if spec.name == "attention")
    backend = next(backend for backend in spec.backends if backend.name == "cuda")
    q = torch.empty(1, 64, 2, 128, dtype=torch.bfloat16)
    call = spec.prepare(q=q, k=q, v=q)
    said = {}
    for chip in ("sm80", "sm86", "sm89", "sm90", "sm120"):
        with recording(chip):
            said[chip] = backend.why_not(call)
    sentence = "a block takes 101 KiB of shared memory, {} gives 99"
    expected = {chip: sentence.format(chip) for chip in ("sm86", "sm89", "sm120")}
    assert said == {"sm80": None, "sm90": None} | expected


# The gate of an op and what its records would say: each must turn it red.
DOCTORED = [
    (test_nothing_spills, "attention", "stack", 8),
    (test_nothing_spills, "attention", "local", 2),
    (test_nothing_spills, "apply_rope", "registers", 129),
    (test_attention_multiplies_on_tensor_cores, "attention", "tensor", 0),
    (test_attention_multiplies_on_tensor_cores, "attention", "copy16", 0),
    (test_attention_multiplies_on_tensor_cores, "attention", "store16", 0),
    (test_divided_attention_reads_rows_once, "divided_attention", "tensor", 0),
    (test_divided_attention_reads_rows_once, "divided_attention", "load16", 0),
    (test_decode_attention_reads_16_bytes_at_a_time_and_multiplies_on_tensor_cores, "decode_attention", "tensor", 0),
    (test_decode_attention_reads_16_bytes_at_a_time_and_multiplies_on_tensor_cores, "decode_attention", "copy16", 0),
    (test_apply_rope_moves_16_bytes_at_a_time, "apply_rope", "load16", 0),
    (test_qkv_prologue_moves_16_bytes_at_a_time, "qkv_prologue", "store16", 0),
    (test_kv_append_moves_16_bytes_at_a_time, "kv_append", "load16", 0),
    (test_rearrange_moves_16_bytes_at_a_time, "rearrange", "load16", 0),
]


@built
@pytest.mark.parametrize(("gate", "op", "what", "number"), DOCTORED)
def test_a_doctored_record_turns_its_gate_red(gate, op, what, number, monkeypatch):
    def doctored(kernel):
        if what in kernel.instructions:
            return replace(kernel, instructions={**kernel.instructions, what: number})
        return replace(kernel, **{what: number})

    records = tuple(map(doctored, kernels(op)))
    monkeypatch.setattr(sys.modules[__name__], "kernels", lambda op: records)
    with pytest.raises(AssertionError):
        gate(op) if gate is test_nothing_spills else gate()


@pytest.mark.skipif(library.cuda_unbuilt() is not None, reason=str(library.cuda_unbuilt()))
def test_too_much_shared_memory_turns_its_gate_red(monkeypatch):
    monkeypatch.setattr(library, "cuda_launches", lambda run: [("kernel", 1, 1, 128, library.shared_limit("sm80") + 1)])
    with pytest.raises(AssertionError, match="kernel"):
        test_shared_memory_fits_every_chip_that_is_served("apply_rope")


# What each function of csrc/include/vkernels/device/ must have become.
INSTRUCTIONS = {
    "cp.async": r"LDGSTS\.E\.BYPASS\S*\.128",
    "its commit": r"LDGDEPBAR",
    "its wait": r"DEPBAR\.LE SB0, 0x1",
    "a barrier": r"BAR\.SYNC",
    "an arrival": r"BAR\.ARV",
    "ldmatrix x4": r"LDSM\.16\.M88\.4",
    "ldmatrix x2": r"LDSM\.16\.M88\.2",
    "ldmatrix x4 transposed": r"LDSM\.16\.MT88\.4",
    "ldmatrix x2 transposed": r"LDSM\.16\.MT88\.2",
    "movmatrix": r"MOVM\.16\.MT88",
    "mma bf16": r"HMMA\.16816\.F32\.BF16",
    "mma f16": r"HMMA\.16816\.F32 ",
    "a 16-byte load": r"LDG\S*\.128",
    "a load past L1": r"LDG\.E\.NA\.128",
    "a 16-byte store": r"STG\S*\.128",
    "bytes from two registers": r"PRMT",
    "two products in float16": r"HFMA2(\.MMA)? ",
    "a ticket": r"ATOMG?\.E\.ADD\S*GPU",
    "a shuffle": r"SHFL\.IDX",
    "a butterfly": r"SHFL\.BFLY",
    "a shift": r"SHFL\.DOWN",
    "a vote": r"VOTE\.ANY",
    "the least integer": r"REDUX\.MIN\.S32",
    "the largest integer": r"REDUX\.MAX\.S32",
    "2^x": r"MUFU\.EX2",
    "log2 x": r"MUFU\.LG2",
    "two bf16": r"F2FP\.BF16",
    "two f16": r"F2FP\.(F16\.F32\.)?PACK_AB",
}


@built
def test_every_function_of_the_device_layer_is_its_instruction(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    cubin = tmp_path / "every_instruction.cubin"
    source = ROOT / "tests/cuda/every_instruction.cu"
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-cubin", f"-I{ROOT / 'csrc/include'}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    missing = [what for what, pattern in INSTRUCTIONS.items() if not re.search(pattern, code)]
    assert not missing, missing


def run(code: str, **environment: str) -> str:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
def test_a_machine_without_a_driver_is_told_so_in_a_sentence():
    missing = cuda_missing()
    if torch.cuda.is_available():
        assert missing is None
    elif why_not() is None and "VKERNELS_CUDA=0" not in str(missing):  # nvcc is there, and was not to be left alone
        assert missing == "no NVIDIA driver is installed (libcuda.so.1 is not found)"
    else:
        assert missing is not None
        assert missing.startswith("vkernels was built without CUDA kernels (")


@pytest.mark.skipif(library.cuda_unbuilt() is not None, reason=str(library.cuda_unbuilt()))
def test_a_launch_that_fails_is_an_exception_that_names_op_and_kernel():
    """The driver's absence is the failure that every machine without a GPU can show."""
    if not hasattr(library.native(), "cuda_launches"):
        pytest.skip(str(native_missing() or cuda_missing()))
    if (missing := cuda_missing()) is None:
        pytest.skip("a driver is installed, so the launch would not fail")
    code = """
import torch
from vkernels import library
library.emulator = library.native()  # the real kernels, for tensors of the CPU
q, axis, freq = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
try:
    torch.ops.vkernels.apply_rope.cuda(q, None, torch.zeros(1, 1, 4), axis, freq, None, None, 1.0, False, [1, 0])
except RuntimeError as error:
    print(error)
"""
    said = run(code)
    assert said.startswith("apply_rope, turn_vectors: the kernel could not be sent to its device: "), missing
    assert said.endswith("(cudaErrorInsufficientDriver)\n")


class OnGpu:
    """As much of a tensor as `cuda_why_not` looks at."""

    dtype, device = torch.float32, torch.device("cuda", 0)


def test_why_not_in_sentences(monkeypatch):
    assert library.cuda_why_not(torch.empty(0, dtype=torch.float64)) == "dtype float64 is served by the reference only"
    monkeypatch.setattr(library, "emulator", None)
    assert library.cuda_why_not(torch.empty(0)) == "the tensors are on cpu, this backend runs on NVIDIA GPUs"
    monkeypatch.setattr(library, "cuda_missing", lambda: "no driver")
    assert library.cuda_why_not(OnGpu()) == "no driver"
    monkeypatch.setattr(library, "cuda_missing", lambda: None)
    monkeypatch.setattr(library, "capability", lambda device: (7, 5))
    assert library.cuda_why_not(OnGpu()) == "the GPU is sm_75, this backend needs sm_80 or newer"
    monkeypatch.setattr(library, "capability", lambda device: (12, 0))
    assert library.cuda_why_not(OnGpu()) is None


def test_without_the_tests_the_cpu_is_refused():
    """The emulator is test code: a user's CPU tensors never reach it."""
    code = """
import torch, vkernels as vk
q = torch.zeros(1, 4, 2, 8)
try:
    vk.apply_rope(q, None, vk.RopeSpec.build(8), torch.arange(4), backend="cuda")
except vk.NoBackend as error:
    print(error)
"""
    assert "the tensors are on cpu, this backend runs on NVIDIA GPUs" in run(code)


# setup.py, asked for its ninja file only.
ASK_SETUP = f"""
import sys, types, pathlib, tempfile
sys.argv = ["setup.py", "--version"]
import setuptools
setuptools.setup = lambda **kw: None
sys.modules["setup_py"] = module = types.ModuleType("setup_py")
module.__file__ = {str(ROOT / "setup.py")!r}
exec(compile(open(module.__file__).read(), module.__file__, "exec"), module.__dict__)
folder = pathlib.Path(tempfile.mkdtemp())
cuda = module.Cuda(folder, "g++", False)
text = module.NinjaBuild.ninja_file("g++", cuda, pathlib.Path("x.so"), False)
print(".cu.o" in text, "VK_CUDA_ABSENT" in text)
"""


def test_cuda_can_be_left_out_or_insisted_on():
    out = run(ASK_SETUP, VKERNELS_CUDA="0")
    assert "CUDA: vkernels was built without CUDA kernels (VKERNELS_CUDA=0)" in out
    assert out.endswith("False True\n")
    out = run(ASK_SETUP, VKERNELS_CUDA="", PATH=str(ROOT / "nowhere"), CUDA_HOME=str(ROOT / "nowhere"))
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert "nvcc was not found" in out
    with pytest.raises(AssertionError, match="VKERNELS_CUDA=1, but vkernels was built without"):
        run(ASK_SETUP.replace('"g++", False)', '"no-such-compiler", False)', 1), VKERNELS_CUDA="1")


def test_cuda_can_be_compiled_for_one_gpu():
    code = f"{ASK_SETUP}\nprint(*(word for word in module.NVCC_FLAGS if word.startswith('arch=')))"
    for archs, flags in {
        "": "arch=compute_80,code=[sm_80,sm_90a,compute_80]",
        "90a": "arch=compute_80,code=[sm_90a]",
        "80,ptx": "arch=compute_80,code=[sm_80,compute_80]",
    }.items():
        assert run(code, VKERNELS_CUDA="0", VKERNELS_CUDA_ARCHS=archs).endswith(f"\n{flags}\n")
    with pytest.raises(AssertionError, match="VKERNELS_CUDA_ARCHS must name 80, 90a, ptx, got 70"):
        run(code, VKERNELS_CUDA="0", VKERNELS_CUDA_ARCHS="70,90a")


def test_explain_names_the_cuda_backend():
    if library.emulator is None:
        pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)")
    q = torch.zeros(1, 4, 2, 8)
    told = str(vkernels.explain("apply_rope", q, None, vkernels.RopeSpec.build(8), torch.arange(4), backend="cuda"))
    assert told.splitlines()[0] == "apply_rope: backend cuda"
