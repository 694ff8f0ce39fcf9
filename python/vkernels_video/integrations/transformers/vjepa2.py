"""V-JEPA2's rotary positions, which are no rotation: neighbours are a pair, but each member turns by its own angle.

Element e of an axis of D elements has frequency e mod D/2, so the members 2j and 2j+1 of a pair turn by the angles of
frequencies 2j and 2j+1, which is what `apply_rope` does with tables of two angles a pair. Checkpoints were trained so;
the tables are computed in the dtype they were trained in.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import vkernels as vk
from vkernels_video.integrations.transformers.seams import Seam

Tables = tuple[Tensor, Tensor]  # cos and sin: b|1 s 2 pairs


def rotary(module: Any, seam: Seam) -> Any:
    sizes = (module.d_dim, module.h_dim, module.w_dim)
    end = sum(sizes)
    spec = vk.RopeSpec((0.0,) * (end // 2), layout="pair")

    def apply_rotary_embeddings(self: Any, qk: Tensor, pos_ids: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        seam.called()
        if pos_ids[0].dim() == 1 and not torch.compiler.is_compiling():
            tables = _of_a_whole_clip(pos_ids[0].shape[0], self.grid_size, sizes, qk.dtype, qk.device)
        else:
            tables = _tables(pos_ids, sizes, qk.dtype)
        turned: Any = vk.apply_rope(qk.transpose(1, 2), None, spec, angle=tables)
        return turned.transpose(1, 2)

    return apply_rotary_embeddings


@lru_cache(maxsize=8)
def _of_a_whole_clip(
    tokens: int, side: int, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tables:
    with torch.inference_mode(False):
        token = torch.arange(tokens, device=device)
        place = token % (side * side)
        return _tables((token // (side * side), place // side, place % side), sizes, dtype)


def _tables(positions: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int, int], dtype: torch.dtype) -> Tables:
    angles = []
    for position, size in zip(positions, sizes, strict=True):
        if position.dim() == 3:  # repeated for every head
            position = position[:, 0]
        omega = torch.arange(size // 2, dtype=dtype, device=position.device)
        omega /= size / 2.0
        angles.append((position.unsqueeze(-1) * (1.0 / 10000**omega)).repeat(*[1] * position.dim(), 2))
    angle = torch.cat(angles, -1)
    if angle.dim() == 2:
        angle = angle[None]
    by_member = angle.unflatten(-1, (-1, 2)).transpose(-1, -2).contiguous()
    return by_member.cos().float(), by_member.sin().float()
