"""apply, accelerated: one model of an earlier transformers, or of code that carries its files, made to use vkernels."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from vkernels_video.integrations.eras import known, masks
from vkernels_video.integrations.eras import rope as ropes
from vkernels_video.integrations.eras.known import Kind
from vkernels_video.integrations.transformers import bt_adapter
from vkernels_video.integrations.transformers.fitting import Fitter, restore, usable
from vkernels_video.integrations.transformers.patches import Patches, reads, with_names
from vkernels_video.integrations.transformers.report import Report
from vkernels_video.integrations.transformers.seams import MARK


def apply(model: torch.nn.Module, *, attention: bool = True, rope: bool = True, strict: bool = True) -> Report:
    """Make one model written against transformers 4 run on vkernels, in place, and say what was replaced.

    Attention modules run a forward of ours bound to the instance, decoders hand over masks as O(tokens) intervals in
    place of a dense tensor, tuples and Cache objects hold what they held. Classes and modules are not touched, also
    where somebody replaced a class's forward before (LLaVA's flash-attention patch); `restore(model)` puts everything
    back.

    Args:
        model:     a model, or a part of one; on a real device, not yet compiled
        attention: LLaMA's, CLIP's, BLIP-2's EVA ViT's and Q-Former's, every module that reads the dictionary of
                   attention functions of 4.48 and later, and BT-Adapter's layers whole
        rope:      LLaMA's `apply_rotary_pos_emb`, whichever arguments its year gave it
        strict:    raise where a class this adapter knows has another form; False leaves it and says so in the report
    Returns:
        a Report, as `transformers.apply` makes; applying again with the same options returns it as it is
    Raises:
        MissingSeam: strict, and a known class has a form of no era (the message names its package)
        TypeError, ValueError: not a model that anything of this can be done to; the model is as it was
    Example:
        >>> report = eras.apply(model)
        >>> print(report.verify(inputs))
    """
    options = dict(attention=attention, rope=rope, strict=strict)
    if (report := usable(model, options)) is not None:
        return report
    report = Report(weakref.ref(model), Patches(), options, origin(model), counted_forwards)
    rule = "have attention of transformers 4 (LLaMA, CLIP, BLIP-2's towers, one that reads ALL_ATTENTION_FUNCTIONS)"
    rule += " or layers of BT-Adapter"
    return _Fitter(model, report).run(rule)


@contextlib.contextmanager
def accelerated(model: torch.nn.Module, **options: Any) -> Iterator[Report]:
    """`apply` on entering, `restore` on leaving, whatever happens in between."""
    report = apply(model, **options)
    try:
        yield report
    finally:
        restore(model)


def origin(model: Any) -> str:
    """The package of the first known class in a model, with its version where it has one."""
    found = [m for m in model.modules() if known.kind_of(type(m)) is not None] if hasattr(model, "modules") else []
    module = type(found[0] if found else model).__module__
    root = sys.modules.get(module.split(".")[0])
    version = getattr(root, "__version__", None)
    return f"{root.__name__} {version}" if root is not None and version else module


@contextlib.contextmanager
def counted_forwards(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """Count the forwards of the stock model's attention modules."""
    calls: Counter[str] = Counter()
    known_ones = [m for m in model.modules() if known.kind_of(type(m)) is not None]
    hooks = [m.register_forward_hook(lambda module, *_: calls.update([type(module).__name__])) for m in known_ones]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Fitter(Fitter):
    """Replaces what it finds in a model of transformers 4."""

    def fit(self) -> None:
        if self.options["attention"]:
            for module in self.model.modules():
                bt_adapter.replace(self, module)
        for name, module in self.model.named_modules():
            if (kind := known.kind_of(type(module))) is not None:
                self.refuse_mixed(name, module)
                self._attention(module, kind)
        if self.options["attention"]:
            for module in self.model.modules():
                self._mask(module)
        self.unasked("attention", "rope")

    def _attention(self, module: Any, kind: Kind) -> None:
        if (why := _why_left(module)) is not None:
            return self.leave("attention", module, why)
        if (lost := kind.lost(type(module))) is not None:
            return self.lost("attention", module, lost)
        stock = type(module).forward
        names: dict[str, Any] = {}
        if kind.turns and (lost := ropes.why_not(stock)) is not None:
            self.lost("rope", module, lost)
        elif kind.turns and self.options["rope"]:
            seam = self.count("rope", module, f"{ropes.NAME} of {stock.__module__}", "vkernels.apply_rope")
            names[ropes.NAME] = ropes.make(stock.__globals__[ropes.NAME], module.head_dim // 2, seam)
        if self.options["attention"]:
            seam = self.count("attention", module, f"forward of {stock.__module__}", "vkernels.attention")
            made = kind.make(stock, names, seam)
        elif names:
            made = with_names(stock, **names)
        else:
            return None
        return self.patches.set(module, "forward", types.MethodType(made, module))

    def _mask(self, decoder: Any) -> None:
        """A decoder's own mask, dense where it stood, as intervals where its layers attend with ours."""
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList):
            return None
        attentions = [m for m in (getattr(layer, "self_attn", None) for layer in layers) if m is not None]
        ours = ["attention" in m.__dict__.get(MARK, {}) and _turns(m) for m in attentions]
        if not any(ours):
            return None
        if not all(ours):  # the others want a dense one
            return self.leave("mask", decoder, "not every layer of it is replaced")
        if (lost := known.mask_lost(type(decoder))) is not None:
            return self.lost("mask", decoder, lost)
        for name, (_, make) in known.MASK_METHODS.items():
            if (stock := getattr(type(decoder), name, None)) is not None:
                seam = self.count("mask", decoder, name, "intervals of keys")
                return self.patches.set(decoder, name, types.MethodType(make(stock, seam), decoder))
        stock = type(decoder).forward
        used = [name for name in known.MASK_FUNCTIONS if reads(stock, name)]
        seam = self.count("mask", decoder, " and ".join(used), "intervals of keys")
        names = {name: masks.prepared_mask(stock.__globals__[name], seam) for name in used}
        return self.patches.set(decoder, "forward", types.MethodType(with_names(stock, **names), decoder))


def _turns(module: torch.nn.Module) -> bool:
    kind = known.kind_of(type(module))
    return kind is not None and kind.turns


def _why_left(module: Any) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is bound to the instance already (accelerate, another patch)"
    if "Flash" in type(module).__name__ and getattr(module, "attention_dropout", False):
        return "it drops attention weights out, and its flash form takes no mask of ours then"
    return None
