"""torch's view of kv_append: it writes the storage of a KVCache and returns nothing."""

from __future__ import annotations

from vkernels.kv_cache import STORAGE
from vkernels.library import lazily, native, ref, register, run_cuda


def _fake(k, v, count, length, table, *storage_and_layout) -> None:
    return None


def _cpu(k, v, count, length, table, *storage_and_layout) -> None:
    *storage, layout = storage_and_layout
    native().kv_append(ref(k), ref(v), ref(count), ref(length), ref(table), [ref(t) for t in storage], layout)


def _cuda(k, v, count, length, table, *storage_and_layout) -> None:
    *storage, layout = storage_and_layout
    run_cuda("kv_append_cuda", (k, v, count, length, table, *storage), layout)


_WRITTEN = ", ".join(f"Tensor({chr(ord('a') + i)}!)? {name}" for i, name in enumerate(STORAGE))

register(
    "kv_append",
    f"(Tensor k, Tensor v, Tensor count, Tensor length, Tensor table, {_WRITTEN}, int[] layout) -> ()",
    fake=_fake,
    backends={"cpu": _cpu, "cuda": _cuda, "triton": lazily("vkernels.ops.kv_append.triton", "kv_append")},
)
