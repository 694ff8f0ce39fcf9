"""torch's view of decode_attention: schema, fake, native kernels. No gradient: a cache is for inference."""

from __future__ import annotations

from functools import cache

import torch

from vkernels.check import require
from vkernels.counters import counters
from vkernels.kv_cache import STORAGE
from vkernels.library import lazily, native, ref, register, run_cuda, unit_stride


def _fake(q, length, table, *rest):
    b, s, n, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(b, n, s, dtype=torch.float32)


def _cpu(q, length, table, *rest):
    *storage, scale, window, layout = rest
    o, lse = _fake(q, length, table)
    tensors = [ref(t) for t in storage]
    native().decode_attention(ref(q), ref(length), ref(table), tensors, scale, window, layout, ref(o), ref(lse))
    return o, lse


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


# A warp's step is 16 uncoded or 32 coded tokens; a split is worth its part from a step for each of its 8 warps on.
_WARPS, _ROW_STEP, _CODE_STEP, _MOST_SPLITS = 8, 16, 32, 512


def _splits(device: torch.device, programs: int, rows: int, room: int, layout: list[int]) -> int:
    """How many blocks share the keys of a row of queries: two for each multiprocessor, one where there is much to join.

    From sizes of storage only: what a sequence holds is known to the device alone, which divides that evenly.
    """
    bits, group, residual, sinks, _, ring = layout
    history = (ring or room) // _CODE_STEP if bits else -(-(ring or room) // _ROW_STEP)
    uncoded = -(-(sinks + (residual + group if bits else 0)) // _ROW_STEP) * (8 // bits if bits else 1)
    blocks = _multiprocessors(device) * (2 if rows <= 4 else 1)
    return max(1, min(-(-blocks // programs), -(-(history + uncoded) // _WARPS), _MOST_SPLITS))


def _cuda(q, length, table, *rest):
    *storage, scale, window, layout = rest
    o, lse = _fake(q, length, table)
    pool = storage[2] if layout and layout[0] else storage[0]
    b, s, n, d = q.shape if q.dim() == 4 else (0, 1, 1, 1)
    m = pool.shape[1] if pool is not None and pool.dim() > 1 else 0
    require(m > 0 and n > 0 and n % m == 0, "decode_attention", "q", "have a multiple of the cache's heads", n)
    require(len(layout) == 6 and table.dim() == 2, "decode_attention", "layout", "be that of a KVCache", layout)
    rows = n // m * s
    block = 8 if rows <= 8 else 16
    programs = b * m * -(-rows // block)
    if programs:
        splits = _splits(q.device, programs, rows, table.shape[1] * layout[4], layout)
        part = torch.empty(programs * splits * block * (d + 2), dtype=torch.float32, device=q.device)
        tensors = (unit_stride(q), length, table, *storage, o, lse, part, counters(programs, q.device))
        run_cuda("decode_attention_cuda", tensors, scale, window, layout, splits)
    return o, lse


register(
    "decode_attention",
    f"(Tensor q, Tensor length, Tensor table, {', '.join(f'Tensor? {name}' for name in STORAGE)}, "
    "float scale, int window, int[] layout) -> (Tensor o, Tensor lse)",
    fake=_fake,
    backends={"cpu": _cpu, "cuda": _cuda, "triton": lazily("vkernels.ops.decode_attention.triton", "decode_attention")},
)
