"""What is known about the Triton kernels without a GPU. Their numbers are checked by test_every_op.py, interpreted.

Compiling needs Triton without its interpreter, so these tests start a Python of their own.
Trusted after mutation: strides passed undivided (rows of 72 elements lose their 16-byte accesses) and a length Triton
may specialise on each turned a test red.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import vkernels as vk

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")


def python(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_every_real_size_compiles_without_a_fault(arch):
    """No spills, no shared memory over the limit, tensor cores and 16-byte accesses where they are due."""
    print(table := python("-m", "vkernels", "compile", "--arch", arch))
    assert table.splitlines()[-1].endswith(" compiled, 0 with faults")


def test_every_row_of_every_table_compiles_without_a_fault():
    """Rows that no real size takes, by small calls. Here for one chip, for time; docs/numerics.md has the others."""
    print(table := python("-m", "vkernels", "compile", "--rows", "--arch", "sm90"))
    assert table.splitlines()[-1].endswith(" compiled, 0 with faults")


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_every_row_of_every_table_is_taken(arch):
    """By a real size, or by a call of `OpSpec.rows`: a row that neither takes would never be compiled."""
    from vkernels.spec import compiled_specs
    from vkernels.triton import aot
    from vkernels.triton.tiles import asking, row, rows_of, table

    left = []
    for spec in compiled_specs():
        with asking() as asked:
            for _ in aot.launches(spec, [*spec.shapes, *spec.rows], arch):
                pass
        taken = [row(op, kernel, arch, d, size) for op, kernel, d, size in asked]
        rows = [(kernel, row) for kernel in table(spec.name) for row in rows_of(spec.name, kernel, arch)]
        left += [(spec.name, kernel, row) for kernel, row in rows if not any(row is other for other in taken)]
    assert not left


def test_no_row_says_what_the_next_would():
    from vkernels.spec import compiled_specs
    from vkernels.triton.tiles import LIMITS, table

    def serves(rows, d, size):
        fits = (row for row in rows if row.get("d", d) >= d and row.get("bytes", size) >= size)
        return next(({k: v for k, v in row.items() if k not in LIMITS} for row in fits), None)

    idle = []
    for spec in compiled_specs():
        for kernel, chips in table(spec.name).items():
            for chip, rows in chips.items():
                if chip.startswith("sm"):
                    borders = [1, *(d for row in rows if "d" in row for d in (row["d"], row["d"] + 1))]
                    calls = [(d, size) for d in borders for size in (1, 2, 4, 8)]
                    for i in range(len(rows)):
                        rest = rows[:i] + rows[i + 1 :]
                        if all(serves(rows, *call) == serves(rest, *call) for call in calls):
                            idle.append((spec.name, kernel, chip, rows[i]))
    assert not idle


def test_exceptions_from_the_rules_are_listed():
    """Each has its reason beside it, in the op's spec.py. No real size has any."""
    from vkernels.spec import compiled_specs

    shapes = [(spec.name, shape) for spec in compiled_specs() for shape in (*spec.shapes, *spec.rows)]
    assert {(op, shape.id): shape.spills for op, shape in shapes if shape.spills} == {
        ("attention", "float32-d256"): 32,
        ("decode_attention", "int4-float32"): 144,
        ("divided_attention", "float32-packed-d256"): 120,
        ("divided_attention", "float32-tiled-d256"): 840,
    }
    hmma = {("attention", "d256"), ("divided_attention", "packed-d256"), ("divided_attention", "tiled-d256")}
    assert {(op, shape.id) for op, shape in shapes if shape.hmma} == hmma


def test_a_fault_is_found_in_the_machine_code():
    """Kernels that each break one rule, compiled."""
    said = json.loads(python(str(Path(__file__).parent / "faulty_kernels.py")))
    assert said["sound"] == []
    assert said["narrow"] == ["16-byte accesses missing: 0 loads, 0 stores"]
    assert re.fullmatch(r"\d+ bytes of local memory, \d+ accesses to it", *said["spills"])
    assert said["no tensor cores"] == ["no HMMA instruction"]
    assert said["mma.sync"] == ["no HGMMA instruction"]
    assert re.fullmatch(r"shared memory \d+ exceeds the 166912 bytes of sm80", *said["shared"])
    assert re.fullmatch(r"does not compile: \w+: .*arange's range must be a power of 2", *said["no code"])


def test_a_kernel_that_does_not_compile_is_a_line_of_the_table():
    """Three rows a tile are none of Triton's; the command ends with 1 and goes on to the kernels after it."""
    code = """
from vkernels.__main__ import main
from vkernels.triton.tiles import overridden
with overridden("_apply_rope_kernel", {"BLOCK_S": 3, "BLOCK_H": 1, "num_warps": 4}):
    assert main(["compile", "--op", "apply_rope", "--arch", "sm90"]) == 1
"""
    table = python("-c", code)
    lines = [line for line in table.splitlines() if "does not compile" in line]
    assert len(lines) > 1
    assert all("_apply_rope_kernel" in line and "must be a power of 2" in line for line in lines)
    assert f"{len(lines)} compiled, {len(lines)} with faults" in table


def test_lengths_do_not_compile_anew():
    """Twenty lengths, one compilation: nothing specialises on a length. A batch of one is its own case."""
    code = """
import json, torch, vkernels as vk
from vkernels.triton.aot import key
from vkernels.triton.launch import recording
spec, keys = vk.RopeSpec.build(64), set()
with recording() as noted:
    for s in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 100, 128, 129, 257, 1000, 1024, 4096):
        q = torch.empty(2, s, 8, 64, dtype=torch.bfloat16)
        vk.apply_rope(q, q[:, :, :4], spec, torch.zeros(2, s), backend="triton")
print(json.dumps([len(noted), len(set(map(key, noted)))]))
"""
    assert json.loads(python("-c", code)) == [20, 1]


def test_a_kernel_is_not_launched_on_the_cpu():
    code = """
import torch, vkernels as vk
from vkernels import NoBackend
q = torch.zeros(1, 4, 2, 8)
try:
    vk.apply_rope(q, None, vk.RopeSpec.build(8), torch.arange(4), backend="triton")
except NoBackend as error:
    print(error)
"""
    assert "the tensors are on cpu, this backend runs on NVIDIA GPUs" in python("-c", code)


def test_the_first_row_of_every_table_is_pinned():
    from vkernels.triton.tiles import table

    pinned = {
        ("apply_rope", "_apply_rope_kernel"): {"BLOCK_S": 4, "BLOCK_H": 8, "num_warps": 4, "maxnreg": 160},
        ("kv_append", "_append_rows_kernel"): {"BLOCK_S": 4, "BLOCK_H": 4, "num_warps": 4},
        ("kv_append", "_append_codes_kernel"): {"d": 64, "BLOCK_C": 64, "BLOCK_T": 64, "num_warps": 4},
        ("qkv_prologue", "_qkv_prologue_kernel"): {
            "d": 80, "bytes": 2, "BLOCK_S": 4, "BLOCK_H": 4, "PROGRAMS": 528, "num_warps": 4,
        },
        ("qkv_prologue", "_norm_stats_kernel"): {"BLOCK_S": 2, "BLOCK_H": 4, "num_warps": 4},
        ("qkv_prologue", "_qkv_prologue_bwd_kernel"): {
            "bytes": 2, "BLOCK_S": 4, "BLOCK_H": 4, "PROGRAMS": 1056, "num_warps": 4, "maxnreg": 128,
        },
    }  # fmt: skip
    assert {(op, kernel): table(op)[kernel]["sm80"][0] for op, kernel in pinned} == pinned


def test_a_newer_chip_takes_the_rows_of_an_older_one():
    from vkernels.triton.tiles import overridden, tiles

    row = tiles("apply_rope", "_apply_rope_kernel", "sm120", d=64)
    assert row == tiles("apply_rope", "_apply_rope_kernel", "sm80", d=64)
    with overridden("_apply_rope_kernel", {"BLOCK_S": 1}):
        assert tiles("apply_rope", "_apply_rope_kernel", "sm90", d=64) == {"BLOCK_S": 1}


def test_a_direct_call_is_refused_before_it_could_read_outside():
    q = torch.zeros(1, 4, 2, 8)
    axis, freq = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    rope = torch.ops.vkernels.apply_rope.triton
    with pytest.raises(ValueError, match="apply_rope: pos must speak of 1 or 1 samples of 4 tokens"):
        rope(q, None, torch.zeros(1, 1, 3), axis, freq, None, None, 1.0, False, [1, 0])
    with pytest.raises(ValueError, match="apply_rope: layout must rotate 8 of d=8 elements"):
        rope(q, None, torch.zeros(1, 1, 4), axis, freq, None, None, 1.0, False, [1, 2])


def test_an_axis_that_is_not_there_does_not_turn():
    if torch.cuda.is_available():
        pytest.skip("on a GPU the tensors below would have to be there")
    q = torch.randn(1, 4, 2, 8)
    axis, freq = torch.full((1, 4), 9, dtype=torch.int32), torch.full((4,), 1 << 60)
    out, _ = torch.ops.vkernels.apply_rope.triton(
        q, None, torch.ones(1, 1, 4), axis, freq, None, None, 1.0, False, [1, 0]
    )
    assert torch.equal(out, q)


def test_the_dispatcher_is_passed_only_where_nobody_listens():
    """The operator is seen by whoever watches operators, and asked where a gradient is; else it is called directly."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from vkernels import library

    class Watching(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    q = torch.randn(1, 4, 2, 8)
    spec, pos = vk.RopeSpec.build(8), torch.arange(4)
    with Watching() as watch:
        seen = vk.apply_rope(q, None, spec, pos)
    assert "vkernels.apply_rope.cpu" in watch.seen
    assert torch.equal(seen, vk.apply_rope(q, None, spec, pos))
    with torch.profiler.profile() as profile:
        vk.apply_rope(q, None, spec, pos)
    assert "vkernels::apply_rope" in {event.key for event in profile.key_averages()}
    assert vk.apply_rope(q.requires_grad_(), None, spec, pos).grad_fn is not None
    assert library._plain((q.detach(), None, 1.0, [1, 0]), True)
    with torch.no_grad():
        assert library._plain((q, [q]), torch.is_grad_enabled())
    assert not library._plain((q,), True)
    assert not library._plain(([None, q],), True)
    assert not library._plain((q.to("meta"),), False)
    assert not library._plain((torch.randn(2, dtype=torch.complex64).conj().imag,), False)
    many = torch.randn(3, 1, 4, 2, 8)
    mapped = torch.vmap(lambda x: vk.apply_rope(x, None, spec, pos, backend="cpu"))(many)
    assert torch.equal(mapped, torch.stack([vk.apply_rope(x, None, spec, pos) for x in many]))
