"""decode_attention against SDPA on what the cache decodes to, kept in bf16 (16 bits an element, their own layout), and
against decoding it first; kv_append against copying the tokens, and against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import rivals as room
from benchmarks.gpu.cases import Race
from benchmarks.gpu.rivals.sdpa import KERNELS, heads_first


def rivals(race: Race, kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], room.Rival]]]:
    yield from (_append(kwargs) if race.op == "kv_append" else _decode(kwargs))


def _decode(kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], room.Rival]]]:
    q, cache, scale = kwargs["q"], kwargs["cache"], kwargs.get("scale")
    lengths = {cache.length(i) for i in range(cache.b)}
    if kwargs.get("window") is not None or q.shape[1] != 1 or len(lengths) > 1 or not cache.length():
        return

    def kept(kernel: str) -> room.Rival:
        keys, values = (x.to(q.dtype).transpose(1, 2).contiguous() for x in cache.dequantised())
        label = f"SDPA {kernel}, {str(q.dtype).removeprefix('torch.')} cache"
        return room.Rival(
            label, lambda: heads_first(q.transpose(1, 2), keys, values, kernel, scale=scale).transpose(1, 2)
        )

    for kernel in KERNELS:
        yield f"SDPA {kernel}", lambda kernel=kernel: kept(kernel)
    if cache.bits:

        def decoded() -> Any:
            keys, values = (x.to(q.dtype).transpose(1, 2) for x in cache.dequantised())
            return heads_first(q.transpose(1, 2), keys, values, None, scale=scale).transpose(1, 2)

        yield "decode the cache, then SDPA", lambda: room.Rival("decode the cache, then SDPA", decoded)


def _append(kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], room.Rival]]]:
    k, v = kwargs["k"], kwargs["v"]
    keys, values = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (k, v))

    def copy() -> None:
        keys.copy_(k.transpose(1, 2))
        values.copy_(v.transpose(1, 2))

    yield "a copy at full precision", lambda: room.Rival("a copy at full precision", copy, False)
