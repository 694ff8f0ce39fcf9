"""decode_attention: the public door."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from vkernels.check import bind, refusal, require, same_dtype
from vkernels.dispatch import Backend, at_most, choose, like
from vkernels.kv_cache import KVCache
from vkernels.library import cpu_why_not, cuda_why_not, op, shared_why_not, triton_why_not, unit_stride
from vkernels.ops.decode_attention import reference, torch_op  # noqa: F401  (registers the overload)
from vkernels.remember import remembered

MOST_QUERIES = 8
MOST_CUDA_CHANNELS = 128


class Call(NamedTuple):
    q: torch.Tensor
    cache: KVCache
    scale: float
    window: int | None
    return_lse: bool
    doors: dict[str, Any] | None = None


def prepare(
    q: torch.Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Call:
    name = "decode_attention"
    if not isinstance(cache, KVCache):
        raise TypeError(refusal(name, "cache", "be a KVCache", type(cache).__name__))
    sizes = bind(name, ("q", q, f"{cache.b} s n {cache.d}"))
    same_dtype(name, ("q", q))
    require(q.device == cache.device, name, "q", f"be on {cache.device}", q.device, TypeError)
    s, n = sizes["s"], sizes["n"]
    require(1 <= s <= MOST_QUERIES, name, "q", f"hold 1 to {MOST_QUERIES} tokens", s)
    require(n > 0 and n % cache.m == 0, name, "q", f"have a multiple of {cache.m} heads", n)
    gradient = q.requires_grad and torch.is_grad_enabled()
    require(not gradient, name, "q", "not require a gradient, a cache is for inference", "requires_grad=True")
    scale = 1.0 / math.sqrt(cache.d) if scale is None else float(scale)
    require(math.isfinite(scale), name, "scale", "be finite", scale)
    require(window is None or (isinstance(window, int) and window >= 1), name, "window", "be at least 1", window)
    return Call(q, cache, scale, window, return_lse)


@remembered
def _decide(q, form, lengths, scale, window, return_lse, backend, *, cache) -> tuple[Backend, float, dict[str, Any]]:
    """(backend, scale, doors). `form` is what the cache looks like."""
    call = prepare(q, cache, scale=scale, window=window, return_lse=return_lse)
    return choose("decode_attention", BACKENDS, backend, call), call.scale, {}


def decode_attention(
    q: torch.Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the newest tokens to everything the cache holds, straight on its codes.

    softmax(q k^T scale) v, where the s queries are the last s tokens of their sequence (already appended): each sees
    the tokens up to itself. A sequence shorter than s has queries before its start; they see nothing.

    Args:
        q:          queries (b s n d), s at most 8, n a multiple of the cache's heads
        cache:      the cache, read only
        scale:      of the scores; None means 1 / sqrt(d)
        window:     a query sees itself and the window - 1 tokens before it; None means all that are held
        return_lse: also return the log of the sum of exponentials (b n s), float32
        backend:    "cpu", "cuda", "triton", "reference"; None takes the first that can run
    Returns:
        o (b s n d) in q's dtype; a query that sees nothing gives 0 and lse -inf. Computed in float32.
    Raises:
        ShapeError, TypeError, ValueError, NoBackend
    Gradients: none.   Deterministic: yes, whatever the number of threads.
    Example:
        >>> decode_attention(q, cache.append(k, v)).shape
        torch.Size([1, 1, 32, 128])
    Source: KIVI, arXiv:2402.02750 (the scheme); Flash-Decoding (the split over keys).
    """
    form, lengths = (cache.form, cache.lengths) if isinstance(cache, KVCache) else (None, None)
    chosen, scale, doors = _decide(q, form, lengths, scale, window, return_lse, backend, cache=cache)
    o, lse = chosen.run(Call(q, cache, scale, window, return_lse, doors))
    return (o, lse) if return_lse else o


def _registered(call: Call, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    c = call.cache
    window = 0 if call.window is None else call.window
    return op("decode_attention", backend, call.doors)(
        unit_stride(call.q), c.lengths, c.table, *c.tensors(), call.scale, window, c.layout.ints()
    )


def _triton_why_not(call: Call) -> str | None:
    if call.cache.dtype == torch.float64:
        return "a cache of dtype float64 is served by the reference only"
    return triton_why_not(call.q)


LARGEST_BLOCK = 115248  # bytes of shared memory of the CUDA kernels


def _cuda_why_not(call: Call) -> str | None:
    if (reason := cuda_why_not(call.q)) is not None:
        return reason
    q, cache = call.q.dtype, call.cache.dtype
    if q == torch.float32:
        return "dtype float32 is served by Triton, the kernel multiplies 16-bit floats"
    if q != cache:
        return f"queries of dtype {q} on a cache of dtype {cache} are served by Triton"
    if call.cache.d > MOST_CUDA_CHANNELS:
        return f"heads of size {call.cache.d} are served by Triton, the kernel takes up to {MOST_CUDA_CHANNELS}"
    return shared_why_not(call.q, LARGEST_BLOCK)


def _kind(call: Call) -> tuple[torch.device, str]:
    """The store decides what is read, the queries that share a key how often."""
    shared = call.q.shape[1] * call.q.shape[2] // call.cache.m
    return like(call.q, None, call.cache.scheme, f"queries <= {at_most(shared, 8, 16)}")


BACKENDS = (
    Backend("cpu", lambda c: cpu_why_not(c.q), lambda c: _registered(c, "cpu")),
    Backend("cuda", _cuda_why_not, lambda c: _registered(c, "cuda"), _kind),
    Backend("triton", _triton_why_not, lambda c: _registered(c, "triton")),
    Backend("reference", lambda c: None, lambda c: reference.decode_attention(c.q, c.cache, c.scale, c.window)),
)
