"""The native library itself: instruction sets, threads, conversions, refusals below the Python door."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vkernels.library import native, native_missing, ref

if native_missing() is not None:
    pytest.skip(native_missing(), allow_module_level=True)

C = native()


def test_best_instruction_set_is_active_and_listed():
    assert C.isa_names()[0] == "baseline"
    assert C.isa_active() in C.isa_usable()
    assert set(C.isa_usable()) <= set(C.isa_names())


@pytest.mark.parametrize("isa", C.isa_usable())
def test_instruction_set_can_be_forced_by_environment(isa):
    code = "from vkernels.library import native; print(native().isa_active())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VKERNELS_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert run.stdout.strip() == isa, run.stderr


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"isa: name must be one of baseline.*, got mmx"):
        C.isa_force("mmx")


def test_threads_are_torchs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert C.num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert C.num_threads() == before


def test_ref_keeps_a_temporary_alive():
    assert isinstance(ref(torch.zeros(3) + 1)[-1], torch.Tensor)
    assert ref(None) is None
