"""xformers.ops.indexing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vkernels.check import require


def scaled_index_add(
    input: Tensor,
    index: Tensor,
    source: Tensor,
    scaling: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """input[index] += alpha * scaling * source, in place; returns input.

    Args:
        input:   (b m d)
        index:   (rows) int64, each at most once
        source:  (rows m d)
        scaling: (d)
    Gradients: input, source, scaling.
    """
    rows = tuple(source.shape) == (len(index), *input.shape[1:])
    require(rows, "scaled_index_add", "source", f"have shape {(len(index), *input.shape[1:])}", tuple(source.shape))
    return input.index_add_(0, index, source if scaling is None else scaling * source, alpha=alpha)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Rows `indices[i]` of sources[i] (s_i d_i), flat, end to end: (sum of rows_i * d_i). Gradients: sources."""
    require(len(sources) == len(indices), "index_select_cat", "indices", f"be {len(sources)} tensors", len(indices))
    return torch.cat([s.index_select(0, i.long()).flatten() for s, i in zip(sources, indices, strict=True)])
