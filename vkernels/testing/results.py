"""What a spec compares: the tensors inside an op's result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from vkernels.spec import OpSpec


def tensors_of(spec: OpSpec, result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order: `spec.outputs` says which, or all of them."""
    if spec.outputs is not None:
        return list(spec.outputs(result))
    return [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
