"""Plans that drop, pick or merge tokens: random keeps, ragged batches, ST-LLM's frames, clusters, ToMe."""

from __future__ import annotations

import torch

from vkernels.check import refusal, require
from vkernels.rearrangement.layout import whole_numbers
from vkernels.rearrangement.plan import RearrangePlan, csr, gather


def _rows(name: str, value: torch.Tensor) -> torch.Tensor:
    """p x n, from n or p x n."""
    if not isinstance(value, torch.Tensor) or value.dim() not in (1, 2):
        raise ValueError(refusal("keep", name, "be a tensor of shape (s) or (b s)", value))
    return value if value.dim() == 2 else value[None]


def keep(
    mask: torch.Tensor | None = None,
    *,
    indices: torch.Tensor | None = None,
    n: int | None = None,
    count: int | None = None,
) -> RearrangePlan:
    """Keep some tokens, in order: a bool `mask` (s) or (b s), True stays; or `indices` (k) or (b k) out of `n` tokens.

    Samples keep equally many tokens. With `count` given a mask is turned into rows without a host sync; a sample that
    keeps fewer is filled with zero rows, one that keeps more is cut.
    """
    require((mask is None) != (indices is None), "keep", "mask", "be given, or indices, not both", "both or neither")
    if indices is not None:
        if n is None:
            raise ValueError(refusal("keep", "n", "be the number of tokens indices choose from", n))
        return gather("keep", _rows("indices", indices), (n,))
    assert mask is not None  # required above
    mask = _rows("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(refusal("keep", "mask", "have dtype bool", mask.dtype))
    if count is None:
        counts = mask.sum(1)
        count = int(counts[0]) if len(counts) else 0
        rule = "keep equally many tokens per sample (pass count, or use unpad)"
        require(bool((counts == count).all()), "keep", "mask", rule, counts.tolist())
    require(0 <= count <= mask.shape[1], "keep", "count", f"lie in 0..{mask.shape[1]}", count)
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices[:, :count]
    idx = torch.where(mask.gather(1, order), order, -1).to(torch.int32).contiguous()
    return RearrangePlan("keep", sources=(mask.shape[1],), n_out=count, idx=idx)


def unpad(mask: torch.Tensor) -> RearrangePlan:
    """Padded to packed: (b s c) -> (total c) by a bool mask (b s); carries `cu_seqlens`. `.inverse` pads again."""
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(refusal("unpad", "mask", "be bool of shape (b s)", f"{mask.dtype} {tuple(mask.shape)}"))
    idx = mask.flatten().nonzero()[:, 0]
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return gather("unpad", idx, (mask.numel(),), whole=True, in_groups=mask.shape[0], cu_seqlens=cu_seqlens)


def pad(cu_seqlens: torch.Tensor, s: int) -> RearrangePlan:
    """Packed to padded: (total c) -> (b s c), zeros after the end of every sequence."""
    whole_numbers("pad", s=s)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    require(bool((lengths >= 0).all()), "pad", "cu_seqlens", "never fall", cu_seqlens.tolist())
    require(bool((lengths <= s).all()), "pad", "s", "be at least the longest sequence", s)
    at = torch.arange(s, device=cu_seqlens.device)[None]
    idx = torch.where(at < lengths[:, None], starts[:, None] + at, -1).flatten()
    total = int(cu_seqlens[-1])
    return gather("pad", idx, (total,), whole=True, out_groups=len(lengths))


def _local_index(t: int, r: int) -> list[int]:
    """ST-LLM: int(T / 2R + round_half_even(i T / R))."""
    return [int(t / (2 * r) + round(i * t / r)) for i in range(r)]


def local_frames(t: int, r: int, l: int) -> RearrangePlan:  # noqa: E741
    """ST-LLM's r frames out of t: (b t*l c) -> (b r*l c)."""
    whole_numbers("local_frames", 1, t=t, r=r)
    whole_numbers("local_frames", l=l)
    require(r <= t, "local_frames", "r", f"be at most t={t}", r)
    frame = torch.tensor(_local_index(t, r))[:, None]
    return gather("local_frames", (frame * l + torch.arange(l)).reshape(-1), (t * l,))


def global_local(t: int, r: int, l: int) -> RearrangePlan:  # noqa: E741
    """ST-LLM's residual input: local frames plus one global frame, two sources, (b t*l c) and (b l c) -> (b r*l c).

    The global frame is `frame_mean(t, l)` of the video, after the model's small MLP.
    """
    local = local_frames(t, r, l).index[0]
    shared = t * l + torch.arange(l, dtype=torch.int32).repeat(r)
    idx = torch.stack([local, shared], 1).reshape(-1)
    return csr("global_local", torch.arange(r * l + 1) * 2, idx, None, (t * l, l))


def clusters(labels: torch.Tensor, k: int, *, size: torch.Tensor | None = None) -> RearrangePlan:
    """Mean of the tokens of every cluster: (b s c) -> (b k c). labels (s) or (b s) in 0..k-1, -1 drops the token.

    `size` (s) or (b s) weights the tokens (how many each already stands for). An empty cluster is zero. No one-hot, no
    host sync but the check of the labels.
    """
    whole_numbers("clusters", k=k)
    labels = _rows("labels", labels).long()
    if labels.numel() and (int(labels.min()) < -1 or int(labels.max()) >= k):
        got = f"{int(labels.min())}..{int(labels.max())}"
        raise IndexError(refusal("clusters", "labels", f"lie in -1..{k - 1}", got))
    p, s = labels.shape
    size = torch.ones(p, s) if size is None else _rows("size", size).float().expand(p, s)
    key = torch.where(labels < 0, k, labels)
    total = torch.zeros(p, k + 1, dtype=torch.float64).scatter_add_(1, key, size.double())
    ordered, order = torch.sort(key, dim=1, stable=True)
    starts = torch.arange(k + 1).expand(p, -1).contiguous()
    ptr = torch.searchsorted(ordered.contiguous(), starts)
    weight = (size.double() / total.gather(1, key)).gather(1, order).float()
    return csr("clusters", ptr, order, weight, (s,))


def tome(metric: torch.Tensor, r: int, *, size: torch.Tensor | None = None, protect: int = 0) -> tuple[
    RearrangePlan, torch.Tensor
]:  # fmt: skip
    """ToMe: merge the r most similar pairs (even, odd) of tokens: (b s c) -> (b s-r c), and the new sizes (b s-r).

    metric (b s d) is what similarity is measured on; size (b s) how many patches a token stands for; the first
    `protect` even tokens (CLS) are never merged. Kept even tokens come first, in order, then all odd ones.
    """
    if metric.dim() != 3:
        raise ValueError(refusal("tome", "metric", "have shape (b s d)", tuple(metric.shape)))
    b, s, _ = metric.shape
    even = (s + 1) // 2
    require(0 <= r <= min(even - protect, s // 2), "tome", "r", f"lie in 0..{min(even - protect, s // 2)}", r)
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    score = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # b even odd
    score[:, :protect] = -torch.inf
    best, partner = score.max(-1)
    merged = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    gone = torch.zeros(b, even, dtype=torch.bool).scatter_(1, merged, True)
    labels = torch.empty(b, s, dtype=torch.int64)
    labels[:, ::2] = torch.where(gone, even - r + partner, (~gone).cumsum(1) - 1)
    labels[:, 1::2] = even - r + torch.arange(s // 2)
    plan = clusters(labels, s - r, size=size)
    size = torch.ones(b, s) if size is None else _rows("size", size).float().expand(b, s)
    return plan, torch.zeros(b, s - r).scatter_add_(1, labels, size)
