"""python -m vkernels_video.integrations.doctor: what would be patched in this environment, and what not and why."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib import import_module

import torch

import vkernels
from vkernels.library import cuda_missing, native_missing
from vkernels_video.integrations.transformers import host


def environment() -> list[str]:
    """Versions, and which kernels are there."""
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = "not installed (pip install 'vkernels[hf]')"
    lines = [
        f"vkernels      {vkernels.__version__}",
        f"torch         {torch.__version__}",
        f"transformers  {transformers}",
        f"cpu kernels   {native_missing() or 'loaded'}",
        f"cuda kernels  {cuda_missing() or 'loaded'}",
    ]
    return lines


def seams() -> tuple[list[str], int]:
    """A line per known class, and how many seams are missing."""
    return seams_of_eras() if host.is_old() else seams_of_today()


def seams_of_eras() -> tuple[list[str], int]:
    """The same for transformers 4, which `integrations.eras` serves by the form of its modeling files."""
    from vkernels_video.integrations.eras import known

    lines, missing = ["registry      none before 5: integrations.eras.apply", "", "seams"], 0
    for family in ("llama", "qwen2", "clip"):
        try:
            file = import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:
            lines.append(f"  {family:18} not in this version")
            continue
        for name, kinds, lost in known.seams_of(file):
            missing += lost is not None
            lines.append(_line(family, name, [] if lost else kinds, [lost] if lost else []))
    return lines, missing


def _line(family: str, name: str, have: list[str], lost: list[str]) -> str:
    return f"  {family:18} {name:42} {', '.join(have)}" + "".join(f"\n      MISSING {why}" for why in lost)


def seams_of_today() -> tuple[list[str], int]:
    from vkernels_video.integrations import transformers as vkt
    from vkernels_video.integrations.transformers.known import FAMILIES, seams_of

    lines = [f"registry      {', '.join(vkt.register())}", "", "seams"]
    missing = 0
    for family, classes in FAMILIES.items():
        for name in classes:
            found = seams_of(family, name)
            have = [kind for kind, lost in found if lost is None]
            lost = [f"{kind}: {why}" for kind, why in found if why is not None]
            missing += len(lost)
            lines.append(_line(family, name, have, lost))
    return lines, missing


def main() -> int:
    print("\n".join(environment()))
    try:
        lines, missing = seams()
    except (ImportError, RuntimeError) as reason:
        print(f"nothing would be patched: {reason}")
        return 1
    print("\n".join(lines))
    print(f"\n{missing} seams missing" if missing else "\nevery known seam is there")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
