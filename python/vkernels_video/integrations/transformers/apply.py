"""apply, restore, accelerated: one model made to use vkernels, and made as it was."""

from __future__ import annotations

import contextlib
import copy
import re
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from vkernels.check import require
from vkernels_video.integrations.transformers import bt_adapter, host, known
from vkernels_video.integrations.transformers import cache as caches
from vkernels_video.integrations.transformers import rope as ropes
from vkernels_video.integrations.transformers.attention import PLAIN, VARLEN, register
from vkernels_video.integrations.transformers.fitting import Fitter, restore, usable, weights_refused
from vkernels_video.integrations.transformers.methods import METHODS, Method
from vkernels_video.integrations.transformers.patches import Patches
from vkernels_video.integrations.transformers.report import Report
from vkernels_video.integrations.transformers.seams import MARK

_HEAD_SIZES = ("head_dim", "attention_head_size")
_CACHE = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")


def apply(
    model: torch.nn.Module,
    *,
    attention: bool = True,
    rope: bool = True,
    vision: bool = True,
    cache: str | None = None,
    strict: bool = True,
) -> Report:
    """Make one transformers model run on vkernels, in place, and say what was replaced.

    Nothing global changes but the two keys `register` adds: another model of the same class, or of the same config,
    stays as it is. `restore(model)` puts everything back.

    Args:
        model:     a model, or a part of one (`model.model.visual`); on a real device, not yet compiled
        attention: every module that reads transformers' attention registry; masks stay structured, vision towers with
                   packed windows make one call per layer
        rope:      rotary positions of text and vision attention
        vision:    patch embeddings, window gathers, pooling, pixel shuffles, residual + norm, divided space-time
                   blocks, MLPs a slice of tokens at a time
        cache:     "int8", "int4" or "int2": `generate` keeps keys and values as codes and attends on them
        strict:    raise where a class this adapter knows has lost a seam; False leaves it and says so in the report
    Returns:
        a Report; applying again with the same options returns it as it is
    Raises:
        MissingSeam: strict, and the installed transformers lacks what is to be replaced (the message names the version)
        TypeError, ValueError: not a model that anything of this can be done to; the model is as it was
    Example:
        >>> report = vkt.apply(model)
        >>> print(report.verify(inputs))
    """
    options = dict(attention=attention, rope=rope, vision=vision, cache=cache, strict=strict)
    known_schemes = (None, *caches.SCHEMES)
    require(cache in known_schemes, "apply", "cache", f"be None, {', '.join(caches.SCHEMES)}", repr(cache))
    fits = cache is None or attention
    require(fits, "apply", "attention", "be True with a cache: only our attention reads codes", False)
    if (report := usable(model, options)) is not None:
        return report
    register()
    report = Report(weakref.ref(model), Patches(), options, f"transformers {host.version()}")
    rule = "have a module vkernels can replace (one that reads the attention registry, or of docs/integrations.md)"
    return _Fitter(model, report).run(rule)


@contextlib.contextmanager
def accelerated(model: torch.nn.Module, **options: Any) -> Iterator[Report]:
    """`apply` on entering, `restore` on leaving, whatever happens in between.

    Example:
        >>> with vkt.accelerated(model) as report:
        ...     model.generate(**inputs)
    """
    report = apply(model, **options)
    try:
        yield report
    finally:
        restore(model)


class _Fitter(Fitter):
    """Replaces what it finds in a model of transformers 5."""

    def fit(self) -> None:
        self._refuse_weights()
        for name, module in self.model.named_modules():
            if known.reads_registry(type(module).forward):
                self.refuse_mixed(name, module)
            found = {kind for kind in ("attention", "rope") if self._offer(kind, module)}
            for kind in sorted(set(known.KNOWN.get(type(module).__name__, ())) - found):
                lost = known.attention_lost if kind == "attention" else known.rope_lost
                self.lost(kind, module, lost(type(module)))
            for method in METHODS.get(type(module).__name__, ()):
                if self.options["vision"]:
                    self._method(module, method)
            if self.options["vision"]:
                bt_adapter.replace(self, module)
        if self.options["attention"]:
            self._keys()
        if self.options["cache"] is not None:
            self._cache()
        self._unreached()
        self.unasked("attention", "rope", "vision")

    # ---- attention and rope

    def _offer(self, kind: str, module: torch.nn.Module) -> bool:
        """Whether `module` has a seam of this kind; it is replaced where the options ask for it."""
        forward = type(module).forward
        if kind == "attention":
            if not known.reads_registry(forward):
                return False
            if self.options["attention"]:
                how = (
                    "vkernels.attention, all windows in one call" if known.is_varlen(forward) else "vkernels.attention"
                )
                stock = getattr(getattr(module, "config", None), "_attn_implementation", None)
                self.count(kind, module, f"{stock} of the registry", how)
            return True
        name = ropes.rope_name(forward)
        if name is None:
            return False
        if (reason := ropes.why_not(forward, name)) is not None:
            self.leave("rope", module, reason)
            return False
        if self.options["rope"]:
            self._turn(module, forward, name)
        return True

    def _turn(self, module: torch.nn.Module, forward: Any, name: str) -> None:
        d = next((x for x in (getattr(module, n, None) for n in _HEAD_SIZES) if isinstance(x, int)), None)
        if d is None:
            return self.leave("rope", module, f"it has no {' or '.join(_HEAD_SIZES)}")
        if "forward" in module.__dict__:
            return self.leave(
                "rope", module, "its forward is bound to the instance already (accelerate, another patch)"
            )
        seam = self.count("rope", module, f"{name} of {type(module).__module__}", "vkernels.apply_rope")
        self.patches.set(module, "forward", types.MethodType(ropes.rotating(forward, name, d // 2, seam), module))

    def _keys(self) -> None:
        """Configs of this model alone, with our keys: the old ones stay untouched, whoever else holds them."""
        memo: dict[int, Any] = {}
        users: dict[int, list[torch.nn.Module]] = {}
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if hasattr(config, "_attn_implementation_internal"):
                own = copy.deepcopy(config, memo)
                users.setdefault(id(own), []).append(module)
                self.patches.set(module, "config", own)
        owned = {id(m.__dict__["config"]): m.__dict__["config"] for group in users.values() for m in group}
        switched = set()
        for key, config in owned.items():
            readers = [m for m in users[key] if known.reads_registry(type(m).forward)]
            if readers:
                varlen = any(known.is_varlen(type(m).forward) for m in readers)
                config._attn_implementation_internal = VARLEN if varlen else PLAIN
                switched.add(key)
        for key, config in owned.items():
            parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
            if key not in switched and any(id(part) in switched for part in parts):
                config._attn_implementation_internal = PLAIN

    # ---- methods, cache, refusals

    def _method(self, module: torch.nn.Module, method: Method) -> None:
        if (lost := known.method_lost(type(module), method)) is not None:
            self.lost(method.kind, module, lost)
            return
        if (reason := method.why_not(module)) is not None:
            self.leave(method.kind, module, reason)
            return
        seam = self.count(method.kind, module, f"{type(module).__name__}.{method.name}", method.ours)
        self.patches.set(module, method.name, types.MethodType(method.make(module, seam), module))

    def _cache(self) -> None:
        target: Any = self.model
        if not hasattr(type(target), "_prepare_cache_for_generation"):
            self.leave("cache", target, "it has no generate")
            return
        stock = type(target)._prepare_cache_for_generation
        if not host.starts_with(stock, ("self", *_CACHE)):
            self.lost(
                "cache",
                target,
                f"{type(target).__name__} generates without _prepare_cache_for_generation({', '.join(_CACHE)})",
            )
            return
        seam = self.count("cache", target, "DynamicCache", f"{self.options['cache']} codes, vkernels.decode_attention")
        made = caches.preparing(stock, self.options["cache"], seam)
        self.patches.set(target, "_prepare_cache_for_generation", types.MethodType(made, target))

    def _unreached(self) -> None:
        """What computes attention and reads no registry, said by name."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.MultiheadAttention):
                self.leave("attention", module, "torch.nn.MultiheadAttention reads no registry")
            own = re.search("Attention$", type(module).__name__) and known.reads_softmax(type(module).forward)
            if own and not known.reads_registry(type(module).forward) and not self._inside_block(module):
                self.leave("attention", module, "its forward computes attention itself and reads no registry")

    def _inside_block(self, module: torch.nn.Module) -> bool:
        whole = {"block", bt_adapter.KIND}
        blocks = (m for m in self.model.modules() if whole & m.__dict__.get(MARK, {}).keys())
        return any(module is part for block in blocks for part in block.modules())

    def _refuse_weights(self) -> None:
        """Every model inside refuses output_attentions before it runs."""
        import transformers

        for module in self.model.modules():
            if isinstance(module, transformers.PreTrainedModel) and self.options["attention"]:
                self.patches.refuse(module, _no_weights)


def _no_weights(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(weights_refused(type(module).__name__))
