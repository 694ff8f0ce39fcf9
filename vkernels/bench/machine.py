"""Where and with what the numbers were measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vkernels
from vkernels.bench.clock import ceilings, in_turn, spread, timer_for
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


PACKAGES = ("triton", "transformers", "flash_attn", "xformers", "liger_kernel")


def version(package: str) -> str | None:
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def ceiling_of(device: str) -> Ceiling:
    """The two limits of the device, measured."""
    if torch.device(device).type == "cpu":
        return measure_cpu()
    timer = timer_for(device)
    found = ceilings(device, timer)
    a, b = (torch.randn(4096, 4096, device=device) for _ in "ab")
    float32 = 2 * 4096**3 / (spread(in_turn(timer, [partial(torch.mm, a, b)], 0.3)[0])[0] / 1e3)
    half = found["bf16_tflop_per_s"] * 1e12
    rates = {"float32": float32, "bfloat16": half, "float16": half}
    return Ceiling(torch.cuda.get_device_name(device), found["copy_gb_per_s"] * 1e9, rates, True)


def environment(ceiling: Ceiling | None = None, device: str = "cpu") -> dict[str, Any]:
    """What a Run says about where it was measured."""
    ceiling = ceiling or ceiling_of(device)
    on_gpu = torch.device(device).type == "cuda"
    own = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if on_gpu else {"isa": _isa()}
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        **own,
        "copy_gb_per_s": ceiling.bytes_per_s / 1e9,
        "gflop_per_s": {k: v / 1e9 for k, v in ceiling.flop_per_s.items()},
        "torch": torch.__version__,
        "vkernels": vkernels.__version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
    }


def _isa() -> str:
    return native().isa_active() if native_missing() is None else "none"
