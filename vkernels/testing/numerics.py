"""The one tolerance policy (docs/numerics.md).

A result may be twice as wrong as eager PyTorch in the same dtype, both judged against float64, plus one rounding band.
Gradients must also point the same way, and no row of them may vanish. Pure moves are compared bit by bit elsewhere.
"""

from __future__ import annotations

import torch

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}


def rounding_band(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of the largest finite magnitude; for float32 four, for sums in another order."""
    finite = truth[torch.isfinite(truth)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return (4 if dtype == torch.float32 else 1) * EPSILON[dtype] * max(largest, 1e-3)


def assert_within_budget(
    got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str = "output", band: float = 1.0
) -> None:
    """`got` against `truth` (float64), allowed twice the error of `eager` plus one rounding band (`band` of them where
    a spec gives a reason)."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(truth.shape)}"
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, want {eager.dtype}"
    truth = truth.double().cpu()
    got64, eager64 = got.double().cpu(), eager.double().cpu()
    infinite = ~torch.isfinite(truth)
    assert torch.equal(got64[infinite], truth[infinite]), f"{what}: infinities differ"
    finite = ~infinite
    assert torch.isfinite(got64[finite]).all(), f"{what}: not finite where the truth is"
    if not finite.any():
        return
    error = (got64 - truth)[finite].abs().max().item()
    eager_error = (eager64 - truth)[finite].abs().max().item()
    budget = 2 * eager_error + band * rounding_band(truth, got.dtype)
    assert error <= budget, f"{what}: error {error:.3e} over budget {budget:.3e} (eager {eager_error:.3e})"


def assert_gradient(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    """The budget above, and: cosine >= 0.999, no row that vanished or appeared."""
    assert_within_budget(got, eager, truth, what)
    a, b = got.double().flatten().cpu(), truth.double().flatten().cpu()
    if b.norm() > 0:
        cosine = torch.dot(a, b) / (a.norm() * b.norm())
        assert cosine >= 0.999, f"{what}: cosine {cosine:.6f} to the true gradient"
    if truth.dim() >= 2 and truth.numel():
        rows_got, rows_true = got.double().norm(dim=-1).cpu(), truth.double().norm(dim=-1).cpu()
        vanished = (rows_got == 0) & (rows_true > 1e-2 * rows_true.max())
        assert not vanished.any(), f"{what}: {int(vanished.sum())} gradient rows vanished"
        appeared = (rows_true == 0) & (rows_got > 1e-2 * rows_true.max())
        assert not appeared.any(), f"{what}: {int(appeared.sum())} gradient rows appeared where the truth is 0"
