"""flash_attn.bert_padding: padded batches to sequences laid end to end, and back. One pass each, both ways."""

from __future__ import annotations

import torch
from torch import Tensor

from vkernels.check import ShapeError, refusal, require


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of input, of rank 2 or more. Gradient: input, summed over rows taken twice."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """`values` as rows `indices` of a tensor of first_axis_dim rows, 0 elsewhere. Gradient: values."""
    empty = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return empty.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask keeps, end to end.

    Args:
        hidden_states:  (b s ...)
        attention_mask: (b s), bool or int, 1 keeps
        unused_mask:    (b s), 1 for tokens that are allocated but not used: kept, but not counted in `seqused`
    Returns:
        tokens (kept ...), indices (kept) into b*s, cu_seqlens int32 (b + 1), the longest length, seqused int32 (b)
    Raises:
        ShapeError
    Gradients: hidden_states.   Waits for the device once, as the result's size is the mask's.
    Source: flash-attn 2.8.
    """
    op = "unpad_input"
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and tuple(mask.shape) != tuple(hidden_states.shape[:2]):
            raise ShapeError(refusal(op, name, f"have shape {tuple(hidden_states.shape[:2])}", tuple(mask.shape)))
    kept = attention_mask.bool() if unused_mask is None else attention_mask.bool() | unused_mask.bool()
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.bool().sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, starts, longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Like `unpad_input`, for rows that hold several sequences: attention_mask_in_length (b s) lists the lengths of
    each row, then zeros."""
    given = attention_mask_in_length
    good = given.shape == hidden_states.shape[:2]
    rule = f"have shape {tuple(hidden_states.shape[:2])}"
    require(good, "unpad_input_for_concatenated_sequences", "attention_mask_in_length", rule, tuple(given.shape))
    place = torch.arange(given.shape[1], device=given.device)
    indices = (place < given.sum(-1, keepdim=True)).flatten().nonzero().flatten()
    lengths = given.flatten()[given.flatten().nonzero().flatten()]
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, starts, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """`unpad_input` undone: (batch seqlen ...), 0 where nothing was kept. Gradient: hidden_states."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
