"""The definition, as the papers write it: rearrange to sequences, attend, rearrange back, average the CLS."""

from __future__ import annotations

import torch


def divided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    t: int,
    l: int,  # noqa: E741
    axis: str,
    cls: int,
    order: str,
    scale: float,
    frames_per_group: int,
) -> torch.Tensor:
    inner = torch.promote_types(q.dtype, torch.float32)
    b, f, g = q.shape[0], frames_per_group, t // frames_per_group
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)

    def sequences(x: torch.Tensor) -> torch.Tensor:  # b s n d -> b g p i n d: p sequences of i tokens per group
        n, d = x.shape[2:]
        x = x.to(inner)
        head, x = x[:, :cls], x[:, cls:]
        x = x.reshape(b, l, t, n, d).transpose(1, 2) if order == "patch" else x.reshape(b, t, l, n, d)
        if axis == "temporal":
            return x.reshape(b, g, f, l, n, d).transpose(2, 3)
        x = x.reshape(b, f, g, l, n, d).transpose(1, 2).reshape(b, g, 1, f * l, n, d)
        return torch.cat([head[:, None, None].expand(b, g, 1, cls, n, d), x], dim=3)

    qs, ks, vs = sequences(q), sequences(k), sequences(v)
    p = torch.einsum("bgpind,bgpjnd->bgpnij", qs, ks).mul(scale).softmax(dim=-1)
    o = torch.einsum("bgpnij,bgpjnd->bgpind", p, vs)

    n, d = o.shape[-2:]
    if axis == "temporal":
        first = o.new_zeros(b, cls, n, d)
        o = o.transpose(2, 3).reshape(b, t, l, n, d)
    else:
        first = o[:, :, 0, :cls].sum(dim=1) / max(g, 1)
        o = o[:, :, 0, cls:].reshape(b, g, f, l, n, d).transpose(1, 2).reshape(b, t, l, n, d)
    if order == "patch":
        o = o.transpose(1, 2)
    return torch.cat([first, o.reshape(b, t * l, n, d)], dim=1).to(q.dtype)
