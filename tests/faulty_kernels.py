"""Triton kernels that each break one rule of vkernels/triton/aot.py. `python tests/faulty_kernels.py` compiles them and
prints, as JSON, what the gate says of each; TRITON_INTERPRET must be unset."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from vkernels.spec import Shape
from vkernels.triton.aot import judged
from vkernels.triton.launch import Launch


@triton.jit
def sound(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def every_other(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Elements that are not neighbours come and go one by one."""
    i = 2 * tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def hoarding(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All of x stays until its sum is known: BLOCK / 32 registers of a lane."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / tl.sum(x, 0))


@triton.jit
def product_by_hand(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], tl.sum(x[:, :, None] * x[None, :, :], 1))


@triton.jit
def stages(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """Tiles of BLOCK x 64 under way, three of them at four stages."""
    i, j, k = tl.arange(0, 16), tl.arange(0, 64), tl.arange(0, BLOCK)
    acc = tl.zeros([16, 64], tl.float32)
    for _ in range(count):
        a = tl.load(x_ptr + i[:, None] * BLOCK + k[None, :])
        acc += tl.dot(a, tl.load(x_ptr + k[:, None] * 64 + j[None, :]))
        x_ptr += BLOCK * 64
    tl.store(y_ptr + i[:, None] * 64 + j[None, :], acc)


@triton.jit
def no_power_of_two(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK + 1)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def said(kernel, bound: str, block: int, chip: str, dtype=torch.float32, options=None, **more) -> list[str]:
    x, y = torch.empty(64, dtype=dtype), torch.empty(64)
    launch = Launch(kernel, (1,), {"x_ptr": x, "y_ptr": y, "BLOCK": block, **more}, {"num_warps": 1, **(options or {})})
    return judged(launch, chip, bound, Shape("", dict, tensor_cores=True))[1]


if __name__ == "__main__":
    found = {
        "sound": said(sound, "bytes", 1024, "sm80"),
        "narrow": said(every_other, "bytes", 1024, "sm80"),
        "spills": said(hoarding, "bytes", 4096, "sm80", options={"maxnreg": 64}),
        "no tensor cores": said(product_by_hand, "arithmetic", 16, "sm80"),
        "mma.sync": said(stages, "arithmetic", 64, "sm90", torch.bfloat16, count=8),
        "shared": said(stages, "arithmetic", 512, "sm80", torch.bfloat16, {"num_warps": 8, "num_stages": 4}, count=8),
        "no code": said(no_power_of_two, "bytes", 64, "sm80"),
    }
    print(json.dumps(found))
