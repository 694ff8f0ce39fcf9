"""What `apply` did to a model, and whether it is right: seams replaced, calls counted, what was left and why."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.patches import Patches
from vkernels_video.integrations.transformers.seams import Left, Seam

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 1e-6}


_ATTENTIONS = {"attention": 1, "block": 2, "divided": 1}  # attention calls in one use of a seam


@contextlib.contextmanager
def counted_attention(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """Count the attention calls of the stock model: those that go through transformers' registry, and forwards of the
    modules that compute attention themselves."""
    calls: Counter[str] = Counter()
    registry = host.attention_interface()
    mapping = type(registry)._global_mapping
    saved = dict(mapping)

    def counting(key: str, function: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return function(*args, **kwargs)

        return attention

    for key, function in saved.items():
        mapping[key] = counting(key, function)
    hard = [m for m in model.modules() if type(m).__name__ == "TimesformerSelfAttention"]
    hooks = [m.register_forward_hook(lambda *_: calls.update(["own"])) for m in hard]
    try:
        yield calls
    finally:
        mapping.clear()
        mapping.update(saved)
        for hook in hooks:
            hook.remove()


class Mismatch(AssertionError):
    """The patched model does not compute what the stock one does."""


@dataclass(frozen=True)
class Verification:
    """One run of both: largest difference relative to the largest stock value, and attention calls before and after."""

    differences: dict[str, float]
    tolerance: float
    calls_before: int
    calls_after: int
    idle: tuple[str, ...]  # seams the inputs never reached

    @property
    def largest(self) -> float:
        return max(self.differences.values(), default=0.0)

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        line = f"largest difference {self.largest:.1e} (at most {self.tolerance:.0e}) over "
        line += f"{len(self.differences)} outputs, {self.calls_before} attention calls before, {self.calls_after} after"
        return line + (f"; not reached by these inputs: {', '.join(self.idle)}" if self.idle else "")


@dataclass
class Report:
    """`print(report)` says it all; `report.verify(inputs)` runs the model both ways and compares."""

    model_ref: weakref.ref[torch.nn.Module]
    patches: Patches
    options: dict[str, Any]
    of: str  # the package the model comes from, with its version
    counting: Callable[[torch.nn.Module], contextlib.AbstractContextManager[Counter[str]]] = counted_attention
    seams: list[Seam] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @property
    def model(self) -> torch.nn.Module:
        model = self.model_ref()
        if model is None:
            raise ReferenceError("report: its model no longer exists")
        return model

    @property
    def calls(self) -> dict[str, int]:
        """Calls of our kernels since `apply` or `reset`, by kind of seam."""
        total: Counter[str] = Counter()
        for seam in self.seams:
            total[seam.kind] += seam.calls
        return dict(total)

    def reset(self) -> None:
        """Count from zero."""
        for seam in self.seams:
            seam.calls = 0
            seam.stock_calls.clear()

    def __str__(self) -> str:
        model = self.model_ref()
        name = "a model that is gone" if model is None else type(model).__name__
        lines = [f"vkernels on {name}, {self.of}, {'in place' if self.patches.active else 'restored'}"]
        lines += [f"  replaced  {seam}" for seam in self.seams]
        lines += [f"  left      {left}" for left in self.left]
        return "\n".join(lines)

    def verify(self, inputs: Mapping[str, Any], tolerance: float | None = None) -> Verification:
        """Run the model on `inputs` stock and patched, without gradients and dropout, and compare every output.

        Args:
            inputs: keyword arguments of the model's forward. Rows that `attention_mask` (b s) marks as padding are not
                compared: what a query that sees nothing returns is nobody's business.
            tolerance: largest difference relative to the largest stock value; None goes by the model's dtype
        Raises:
            Mismatch: they differ by more; the message names the output
        """
        model = self.model
        if not self.patches.active:
            raise ValueError("verify: model must be patched, it was restored; apply(model) first")
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        tolerance = TOLERANCE.get(dtype, 2e-4) if tolerance is None else tolerance
        kept = [(seam.calls, seam.stock_calls.copy()) for seam in self.seams]
        with self.suspended(), self.counting(model) as before:
            expected = run_once(model, inputs)
        self.reset()
        got = run_once(model, inputs)
        after = sum(_ATTENTIONS.get(seam.kind, 0) * (seam.calls + seam.stock_calls.total()) for seam in self.seams)
        idle = tuple(f"{seam.kind} of {seam.where}" for seam in self.seams if not seam.calls)
        for seam, (calls, stock) in zip(self.seams, kept, strict=True):
            seam.calls += calls
            seam.stock_calls += stock
        made = Verification(compare(expected, got, inputs), tolerance, before.total(), after, idle)
        if not made.ok:
            worst = max(made.differences, key=lambda name: made.differences[name])
            raise Mismatch(f"verify: {type(model).__name__} differs in {worst}: {made}")
        return made

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The stock model for a while."""
        self.patches.undo()
        try:
            yield
        finally:
            self.patches.redo()


@torch.no_grad()
def run_once(model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every floating-point output of one forward in eval mode, by name."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return dict(_tensors("output", model(**copy.deepcopy(dict(inputs)))))
    finally:
        for module, mode in modes:
            module.training = mode


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(str(key), each)
    elif isinstance(value, tuple | list):
        for i, each in enumerate(value):
            yield from _tensors(f"{name}[{i}]", each)


def _of_real_tokens(x: Tensor, real: Tensor) -> Tensor:
    """Rows of x (b s ...), or of keys and values (b m s d), that are no padding; anything else as it is."""
    if x.dim() == 4 and (x.shape[0], x.shape[2]) == real.shape:
        x = x.transpose(1, 2)
    return x[real] if x.dim() >= 2 and x.shape[:2] == real.shape else x


def compare(expected: dict[str, Tensor], got: dict[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, float]:
    if expected.keys() != got.keys():
        raise Mismatch(f"verify: outputs are {sorted(got)} where the stock model has {sorted(expected)}")
    padding = inputs.get("attention_mask")
    made = {}
    for name, want in expected.items():
        have = got[name]
        if have.shape != want.shape:
            raise Mismatch(f"verify: {name} has shape {tuple(have.shape)}, stock {tuple(want.shape)}")
        if isinstance(padding, Tensor) and padding.dim() == 2:
            want, have = (_of_real_tokens(x, padding.bool().to(x.device)) for x in (want, have))
        if not want.numel():
            continue
        scale = want.double().abs().max().item()
        worst = (have.double() - want.double()).abs().max().item() / max(scale, 1e-12)
        made[name] = float("inf") if worst != worst else worst
    return made
