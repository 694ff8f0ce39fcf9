"""A vision tower's MLP, a slice of its tokens at a time.

Its hidden rows are three to four times as wide as its tokens. Held for all frames at once they are new memory at every
layer, which the system has to clear before it is written; a slice of them is memory that was used a moment ago. The
products are the same, and so is every row of the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels_video.integrations.transformers.seams import Seam

ROWS = 1024  # a few MB of hidden rows


def sliced(module: Any, seam: Seam) -> Any:
    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        stock = type(self).forward
        if torch.compiler.is_compiling():
            return stock(self, x)
        if (reason := _whole(self, x)) is not None:
            seam.left_to_stock(reason)
            return stock(self, x)
        seam.called()
        rows = x.reshape(-1, x.shape[-1])
        first = stock(self, rows[:ROWS])
        if len(rows) <= ROWS:
            return first.view(*x.shape[:-1], first.shape[-1])
        out = first.new_empty(len(rows), first.shape[-1])
        out[:ROWS] = first
        for begin in range(ROWS, len(rows), ROWS):
            out[begin : begin + ROWS] = stock(self, rows[begin : begin + ROWS])
        return out.view(*x.shape[:-1], out.shape[-1])

    return forward


def _whole(module: Any, x: Tensor) -> str | None:
    """Why this call takes all tokens at once, or None."""
    if x.device.type != "cpu":
        return "a GPU's memory need not be cleared"
    if torch.is_grad_enabled():
        return "a gradient would keep the hidden rows of all slices"
    return "dropout is drawn for all tokens at once" if module.training else None
