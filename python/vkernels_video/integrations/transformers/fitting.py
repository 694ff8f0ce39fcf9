"""What every way of patching a model shares: which models are refused, and how a seam is counted, left or lost."""

from __future__ import annotations

from typing import Any

import torch

from vkernels.check import refusal, require
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.report import Report
from vkernels_video.integrations.transformers.seams import MARK, Left, Seam

REPORT = "_vkernels_report"


def weights_refused(where: str) -> str:
    return refusal(
        "vkernels",
        "output_attentions",
        "be False, the weights are never formed",
        f"True for {where}",
        "restore(model) and transformers' own eager attention give them",
    )


def usable(model: torch.nn.Module, options: dict[str, Any]) -> Report | None:
    """Refuse what cannot be patched; the report of a model that already is, with these options."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(refusal("apply", "model", "be a torch module", type(model).__name__))
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    require(not compiled, "apply", "model", "not be compiled yet (apply, then torch.compile)", type(model).__name__)
    if (report := model.__dict__.get(REPORT)) is not None:
        rule = f"be restored before other options than {report.options} are applied"
        require(report.options == options, "apply", "model", rule, options)
        return report
    inner = next((name for name, m in model.named_modules() if REPORT in m.__dict__ or MARK in m.__dict__), None)
    require(inner is None, "apply", "model", "not hold a part that is patched already (restore it first)", inner)
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    require(meta is None, "apply", "model", "be on a real device (load its weights first)", f"{meta} on meta")
    if getattr(getattr(model, "config", None), "output_attentions", False):
        raise ValueError(weights_refused(f"the config of {type(model).__name__}"))
    return None


def restore(model: torch.nn.Module) -> Report:
    """Put back all that `apply` changed; the report of what it was.

    Raises:
        ValueError: the model is not patched (never was, or was restored before)
    """
    report = model.__dict__.get(REPORT) if isinstance(model, torch.nn.Module) else None
    if report is None:
        raise ValueError(
            refusal("restore", "model", "be one that apply has changed and restore has not", type(model).__name__)
        )
    report.patches.undo()
    return report


class Fitter:
    """Goes through a model once and replaces what it finds; a subclass says what."""

    def __init__(self, model: torch.nn.Module, report: Report):
        self.model, self.report, self.patches = model, report, report.patches
        self.options = report.options
        self.seams: dict[tuple[str, type], Seam] = {}

    def fit(self) -> None:
        raise NotImplementedError

    def run(self, rule: str) -> Report:
        """Fit, or leave the model as it was; `rule` is what a model without a seam breaks."""
        try:
            self.fit()
            require(bool(self.report.seams), "apply", "model", rule, type(self.model).__name__)
        except BaseException:
            self.patches.undo()
            raise
        self.patches.set(self.model, REPORT, self.report)
        return self.report

    def count(self, kind: str, module: torch.nn.Module, stock: str, ours: str) -> Seam:
        key = (kind, type(module))
        if key not in self.seams:
            self.seams[key] = Seam(kind, type(module).__name__, stock, ours)
            self.report.seams.append(self.seams[key])
        seam = self.seams[key]
        seam.modules += 1
        self.patches.set(module, MARK, {**module.__dict__.get(MARK, {}), kind: seam})
        return seam

    def lost(self, kind: str, module: torch.nn.Module, what: str | None) -> None:
        if self.options["strict"]:
            raise host.MissingSeam(
                f"apply: {self.report.of}: {what}, which vkernels replaces ({kind}); "
                "apply(..., strict=False) leaves it as it is"
            )
        self.leave(kind, module, f"{self.report.of}: {what}")

    def leave(self, kind: str, module: torch.nn.Module, why: str) -> None:
        left = Left(kind, type(module).__name__, why)
        if left not in self.report.left:
            self.report.left.append(left)

    def unasked(self, *kinds: str) -> None:
        """Say which kinds of seam the options left out."""
        for kind in kinds:
            if not self.options[kind]:
                self.report.left.append(Left(kind, type(self.model).__name__, f"apply was called with {kind}=False"))

    def refuse_mixed(self, name: str, module: torch.nn.Module) -> None:
        weights = [p for p in module.parameters() if p.is_floating_point() and p.dim() == 2 and p.element_size() > 1]
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in weights})
        rule = f"have one dtype within an attention module ({name})"
        require(len(kinds) <= 1, "apply", "model", rule, " and ".join(kinds))
