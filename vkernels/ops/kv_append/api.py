"""kv_append: the public door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vkernels.check import bind, refusal, require
from vkernels.dispatch import Backend, choose, like
from vkernels.kv_cache import KVCache
from vkernels.library import cpu_why_not, cuda_why_not, op, triton_why_not, unit_stride
from vkernels.ops.kv_append import reference, torch_op  # noqa: F401  (registers the overload)
from vkernels.remember import remembered


class Call(NamedTuple):
    cache: KVCache
    k: torch.Tensor
    v: torch.Tensor
    counts: list[int]
    doors: dict[str, Any] | None = None


def _check(cache: KVCache, k: torch.Tensor, v: torch.Tensor) -> int:
    """The tokens of a call to the cache."""
    name = "kv_append"
    if not isinstance(cache, KVCache):
        raise TypeError(refusal(name, "cache", "be a KVCache", type(cache).__name__))
    sizes = bind(name, ("k", k, f"{cache.b} s {cache.m} {cache.d}"), ("v", v, f"{cache.b} s {cache.m} {cache.d}"))
    for argument, x in (("k", k), ("v", v)):
        rule = f"have the dtype of the cache ({str(cache.dtype).removeprefix('torch.')})"
        require(x.dtype == cache.dtype, name, argument, rule, str(x.dtype).removeprefix("torch."), TypeError)
        require(x.device == cache.device, name, argument, f"be on {cache.device}", x.device, TypeError)
        rule = "not require a gradient, a cache is for inference"
        require(not (x.requires_grad and torch.is_grad_enabled()), name, argument, rule, "requires_grad=True")
    return sizes["s"]


def prepare(
    cache: KVCache, k: torch.Tensor, v: torch.Tensor, *, count: Sequence[int] | torch.Tensor | None = None
) -> Call:
    return Call(cache, k, v, _counts(cache, _check(cache, k, v), count))


def _counts(cache: KVCache, s: int, count: Sequence[int] | torch.Tensor | None) -> list[int]:
    """Tokens of each sequence; there is room for them."""
    counts = [s] * cache.b
    if count is not None:
        counts = [int(c) for c in (count.tolist() if isinstance(count, torch.Tensor) else count)]
        ok = len(counts) == cache.b and all(0 <= c <= s for c in counts)
        require(ok, "kv_append", "count", f"be {cache.b} numbers of tokens up to {s}", counts)
    cache.refuse_overflow("kv_append", counts)
    return counts


@remembered
def _decide(form, lengths, k, v, backend, *, cache) -> tuple[Backend, dict[str, Any]]:
    """(backend, doors). `form` is what the cache looks like; who runs the call does not depend on the counts."""
    _check(cache, k, v)
    return choose("kv_append", BACKENDS, backend, Call(cache, k, v, [])), {}


def kv_append(
    cache: KVCache,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    count: Sequence[int] | torch.Tensor | None = None,
    backend: str | None = None,
) -> KVCache:
    """Add the next tokens of every sequence to the cache, in place.

    A token goes to the sinks, to the rows, or to the recent window; a window that holds a group more than `residual`
    gives its oldest group to the codes. What was coded is never coded again.

    Args:
        cache:   changed in place
        k, v:    keys and values (b s m d) in the cache's dtype
        count:   real tokens of each sequence (b), the first of its s; None means all
        backend: "cpu", "cuda", "triton", "reference"; None takes the first that can run
    Returns:
        the cache
    Raises:
        ShapeError, TypeError, ValueError (overflow), NoBackend
    Numbers: coded in float32, delta and zero in float16 rounded outward, so the error is at most half the stored delta.
        Values are coded as if within +-65504; a NaN makes its group of keys channel or values token NaN.
    Gradients: none.   Deterministic: yes, bit for bit, on every backend and for every split into calls.
    Example:
        >>> kv_append(cache, k, v).length()
        257
    Source: KIVI, arXiv:2402.02750.
    """
    form, lengths = (cache.form, cache.lengths) if isinstance(cache, KVCache) else (None, None)
    chosen, doors = _decide(form, lengths, k, v, backend, cache=cache)
    counts = _counts(cache, k.shape[1], count)
    cache.reserve(counts)
    chosen.run(Call(cache, k, v, counts, doors))
    cache.advance(counts)
    return cache


def _registered(call: Call, backend: str) -> None:
    c = call.cache
    counts = c.counts_on_device(call.counts)
    k, v = unit_stride(call.k), unit_stride(call.v)
    op("kv_append", backend, call.doors)(k, v, counts, c.lengths, c.table, *c.tensors(), c.layout.ints())


def _kind(c: Call) -> tuple[torch.device, str]:
    return like(c.k, None, c.cache.scheme)


BACKENDS = (
    Backend("cpu", lambda c: cpu_why_not(c.k), lambda c: _registered(c, "cpu")),
    Backend("cuda", lambda c: cuda_why_not(c.k), lambda c: _registered(c, "cuda"), _kind),
    Backend("triton", lambda c: triton_why_not(c.k), lambda c: _registered(c, "triton")),
    Backend("reference", lambda c: None, lambda c: reference.kv_append(c.cache, c.k, c.v, c.counts)),
)
