"""Deterministic seeds for every test, and the options of the suite."""

import os
from pathlib import Path

import pytest

# Read when torch is imported. Two test processes of two threads each would otherwise spin for each other's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run in its interpreter; read when it is imported

import cuda_on_cpu
from hypothesis import settings

import vkernels
from vkernels.library import native

settings.register_profile("vkernels", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("vkernels")

if folder := os.environ.get("VKERNELS_TESTED_FROM"):  # `make sanitize`: green on the plain library would prove nothing
    for module in (vkernels, native()):
        found = Path(getattr(module, "__file__", None) or "nowhere").resolve()
        if not found.is_relative_to(Path(folder).resolve()):
            pytest.exit(f"the tests must run on the library under {folder}, got {found}", returncode=2)


cuda_on_cpu.install()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """What compiles for minutes begins first: at the end one process would be busy with it and the others wait."""
    items.sort(key=lambda item: "compiles_without_a_fault" not in item.name)
