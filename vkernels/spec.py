"""What an op must prove. Imported by tests, benchmarks and `python -m vkernels`, never by the library itself.

An op's `spec.py` points at hand-written code and adds the evidence: calls that must work, calls that must be refused
and with which sentence, laws that hold whatever the backend, and what the call costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from vkernels.dispatch import Backend
from vkernels.library import INTERPRETED


class Maker:
    """Seeded inputs of one dtype: what a case is made from."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values, drawn in float64 and rounded to bfloat16 so that every dtype gets the same numbers."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(torch.bfloat16).to(self.dtype).to(self.device)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def rand_bool(self, *shape: int, p: float = 0.5) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)


class Blank(Maker):
    """Tensors nobody fills: real sizes cost nothing where only shapes matter."""

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """A call that must work: `make(Maker)` gives the keyword arguments of the public function, on the maker's device.

    Masks and plans of rearrangement follow the tensors they are used with and may be built anywhere.
    """

    id: str
    make: Callable[[Maker], dict[str, Any]]


@dataclass(frozen=True)
class Shape(Case):
    """A call at a size some model really has: kernels are compiled ahead of time, tuned and measured on it.

    `make` draws large tensors with `randn` only, so that a Blank maker costs nothing.
    """

    model: str = ""  # whose size it is
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    gradients: bool = True  # also backward, where the op has one
    tensor_cores: bool = False  # its arithmetic-bound kernels must use them
    # Exceptions, for which `model` gives the reason:
    spills: int = 0  # bytes of local memory its kernels may hold
    hmma: bool = False  # HMMA will do where HGMMA is due


@dataclass(frozen=True)
class Reject:
    """A call that must be refused with `error`, its message matching the regular expression `match`."""

    id: str
    make: Callable[[Maker], dict[str, Any]]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Cost:
    """What one call must do at the least: floating-point operations and bytes that have to move."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class OpSpec:
    """One op: its public function, how it prepares a call, its backends, and the evidence it owes."""

    name: str
    fn: Callable[..., Any]
    prepare: Callable[..., Any]  # same arguments as fn, less `backend`; returns the Call that backends see
    backends: Sequence[Backend]
    cases: Sequence[Case]
    rejects: Sequence[Reject]
    cost: Callable[[Any], Cost]  # Call -> Cost
    source: str
    differentiable: Sequence[str] = ()  # keyword arguments of fn that receive gradients
    laws: Sequence[Callable[[str, str], None]] = ()  # each takes a backend's name, a device; raises AssertionError
    band: tuple[float, str] = (1.0, "")  # widens the rounding band of outputs, with the reason
    exact: bool = False  # a pure move: bit-equal to the reference
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    shapes: Sequence[Shape] = ()  # real sizes, for the kernels of a GPU
    rows: Sequence[Shape] = ()  # small calls that take the rows of tiles.json no real size takes: only compiled
    outputs: Callable[[Any], Sequence[torch.Tensor]] | None = None  # tensors to compare; default: flatten the result
    notes: Callable[[Any], Sequence[str]] = lambda call: ()  # what `explain` adds about a Call


OPS = (
    "apply_rope",
    "attention",
    "decode_attention",
    "divided_attention",
    "kv_append",
    "qkv_prologue",
    "rearrange",
)


def devices_of(backend: str) -> list[str]:
    """Where a backend's evidence is to be given on this machine: its own kind of device, and for the reference all."""
    gpu = ["cuda"] if torch.cuda.is_available() else []
    if backend == "reference":
        return ["cpu", *gpu]
    if backend == "cpu" or (backend == "triton" and INTERPRETED):
        return ["cpu"]
    return gpu or ["cpu"]  # without a GPU the backend says in a sentence why it cannot run


def all_specs() -> list[OpSpec]:
    return [import_module(f"vkernels.ops.{name}.spec").SPEC for name in OPS]


def compiled_specs() -> list[OpSpec]:
    """Everything with GPU kernels: the ops, and mask lowering, which serves them."""
    return [*all_specs(), import_module("vkernels.masks.spec").SPEC]
