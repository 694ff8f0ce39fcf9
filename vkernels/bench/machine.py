"""Where and with what the numbers were measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vkernels
from vkernels.library import native, native_missing
from vkernels.roofline import Ceiling, measure_cpu


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def commit() -> str:
    """Of the checkout that runs; "unknown" where the package was installed."""
    root = Path(vkernels.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def environment(ceiling: Ceiling | None = None) -> dict[str, Any]:
    ceiling = ceiling or measure_cpu()
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "isa": native().isa_active() if native_missing() is None else "none",
        "copy_gb_per_s": ceiling.bytes_per_s / 1e9,
        "gflop_per_s": {k: v / 1e9 for k, v in ceiling.flop_per_s.items()},
        "torch": torch.__version__,
        "vkernels": vkernels.__version__,
        "python": platform.python_version(),
    }
