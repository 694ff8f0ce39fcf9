"""One call of one of our ops with its arguments made: what is measured, checked, and what rivals are prepared from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

import vkernels as vk
from vkernels.kv_cache import STORAGE
from vkernels.spec import Case, Cost, Maker, OpSpec

Call = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """`kwargs` of the op's public function."""

    op: str
    kwargs: dict[str, Any]
    visible: Callable[..., Any] | None = None  # FlexAttention's predicate (b, h, q, k), where masks have none

    @property
    def spec(self) -> OpSpec | None:
        """None for mask lowering, which has no backends to choose from."""
        return None if self.op == "lower_mask" else import_module(f"vkernels.ops.{self.op}.spec").SPEC

    def given(self, *names: str) -> list[Any]:
        """Arguments by name, None where one was not given."""
        return [self.kwargs.get(name) for name in names]

    def ours(self, backend: str | None = None) -> Call:
        """A call that may be repeated: what it appends to a cache is taken back first, on the host."""
        spec, kwargs = self.spec, self.kwargs
        if spec is None:
            return lambda: vk.lower_mask(kwargs["mask"](), kwargs["device"])
        cache = kwargs.get("cache")
        if not isinstance(cache, vk.KVCache):
            return lambda: spec.fn(**kwargs, backend=backend)
        lengths, counts = list(cache._lengths), cache.lengths
        full = self.op == "qkv_prologue" and not cache.bits and not cache.paged
        rows = (cache.k_rows, cache.v_rows) if full else ()  # what the call writes beside what it returns

        def call() -> Any:
            cache._lengths, cache.lengths = list(lengths), counts
            made = spec.fn(**kwargs, backend=backend)
            return (made, *rows) if rows else made

        return call

    def leaves(self) -> list[torch.Tensor]:
        """The arguments that receive gradients, now requiring them."""
        if self.spec is None or isinstance(self.kwargs.get("cache"), vk.KVCache):
            return []
        names = [name for name in self.spec.differentiable if isinstance(self.kwargs.get(name), torch.Tensor)]
        for name in names:
            self.kwargs[name] = self.kwargs[name].detach().requires_grad_()
        return [self.kwargs[name] for name in names]

    def cost(self) -> Cost:
        return self.spec.cost(self.spec.prepare(**self.kwargs)) if self.spec else Cost(0.0, 0.0)


def problem_of(
    op: str,
    make: Callable[[Maker], dict[str, Any]],
    dtype: torch.dtype,
    device: str = "cpu",
    visible: Callable[..., Any] | None = None,
) -> Problem:
    """The problem whose arguments `make` gives, its cache holding something in every place."""
    kwargs = make(DeviceMaker(dtype, device))
    kwargs.pop("return_lse", None)  # an output nobody else has
    if isinstance(kwargs.get("cache"), vk.KVCache) and not filled(kwargs["cache"]):
        fill(kwargs["cache"])
    return Problem(op, kwargs, visible)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def backward_cost(op: str, forward: Cost) -> Cost:
    """At the least: attention's backward makes 5 products of the forward's 2 and moves twice its bytes; that of a move
    moves the same again."""
    attends = "attention" in op
    return Cost(forward.flop * (2.5 if attends else 1.0), forward.bytes * (2.0 if attends else 1.0))


def outputs(result: Any) -> list[torch.Tensor]:
    """The tensors that everyone returns: lse and the like are ours alone."""
    flat = result if isinstance(result, (list, tuple)) else [result]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def without_gradients(call: Call) -> Call:
    def forward() -> Any:
        with torch.no_grad():
            return call()

    return forward


def pulls_of(made: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What arrives from behind in a backward: random, rounded to bfloat16, so that everyone gets the same numbers."""
    generator = torch.Generator(made[0].device).manual_seed(7)
    drawn = (torch.randn(x.shape, generator=generator, device=x.device) for x in made)
    return [pull.to(torch.bfloat16).to(x.dtype) for pull, x in zip(drawn, made, strict=True)]


class DeviceMaker(Maker):
    """Draws large tensors where they are needed: seconds less than drawing gigabytes on the host."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0):
        super().__init__(dtype, device, seed)
        self.there = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.there, device=self.device) * scale
        return values.to(torch.bfloat16).to(self.dtype)


def fill(cache: vk.KVCache, seed: int = 0) -> None:
    """Something in every place of a cache that only says what it holds, and pages where it has none."""
    cache.reserve(0)
    generator = torch.Generator().manual_seed(seed)
    for name in STORAGE:
        stored = getattr(cache, name)
        if stored is None:
            continue
        if stored.dtype == torch.int32:
            drawn = torch.randint(-(2**31), 2**31 - 1, stored.shape, generator=generator, dtype=torch.int64)
        else:
            drawn = torch.randn(stored.shape, generator=generator) * (0.1 if name.endswith("scale") else 1.0)
        stored.copy_(drawn.to(torch.bfloat16) if stored.is_floating_point() else drawn)


def filled(cache: vk.KVCache) -> bool:
    """False for one that only says it holds something."""
    return not cache.length() or any(stored is not None and bool(stored.any()) for stored in cache.tensors())


def with_contents(case: Case) -> Case:
    """`case`, its cache filled where it was only said to be full."""

    def make(maker: Maker) -> dict[str, Any]:
        kwargs = case.make(maker)
        cache = kwargs.get("cache")
        if isinstance(cache, vk.KVCache) and not filled(cache):
            fill(cache)
        return kwargs

    return dataclasses.replace(case, make=make)
