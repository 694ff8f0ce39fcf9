"""python -m vkernels_video.integrations.doctor: what would be patched in this environment, and what not and why."""

from __future__ import annotations

import importlib.metadata
import sys

import torch

import vkernels
from vkernels.library import cuda_missing, native_missing


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
            lines.append(f"  {family:18} {name:42} {', '.join(have)}" + "".join(f"\n      MISSING {x}" for x in lost))
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
