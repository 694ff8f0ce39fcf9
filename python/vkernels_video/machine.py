"""Where and with what the numbers were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": _isa(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


PACKAGES = ("vkernels", "torch", "transformers", "einops", "av")


def _version(package: str) -> str:
    if package == "vkernels":
        import vkernels

        return vkernels.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _isa() -> str:
    from vkernels.library import native, native_missing

    return native_missing() or native().isa_active()
