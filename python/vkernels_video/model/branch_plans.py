"""How tokens move between a trunk and BT-Adapter's branch, as plans: every step is one pass over memory.

Trunk tokens are frame-major, x [b t (1 + l) c], CLS first in every frame. Branch tokens are patch-major,
z [b 1 + l t c], one CLS for the video. Where the branch averages frames in pairs, the trunk has `per` = 2 frames for
each of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkernels.rearrangement import RearrangePlan, csr


def _patch_rows(index: Tensor, t: int, l: int, per: int) -> Tensor:  # noqa: E741
    """The trunk rows [b k per] behind branch patches `index` [b k] (patch t + frame)."""
    patch, frame = index // t, index % t
    frames = frame[..., None] * per + torch.arange(per)
    return frames * (1 + l) + 1 + patch[..., None]


def _cls_rows(t: int, l: int, per: int) -> Tensor:  # noqa: E741
    return torch.arange(t * per) * (1 + l)


def _rows(name: str, first: Tensor, first_weight: Tensor, rest: Tensor, rest_weight: Tensor, sources) -> RearrangePlan:
    """A plan whose row 0 sums `first` [w] and whose other rows sum `rest` [b k v], with those weights."""
    b, k, fan = rest.shape
    idx = torch.cat([first.expand(b, -1), rest.flatten(1)], dim=1)
    weight = torch.cat([first_weight, rest_weight.repeat(k)]).expand(b, -1)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), len(first) + fan * torch.arange(k + 1)])
    return csr(name, ptr.expand(b, -1), idx, weight, sources)


def start_rows(t: int, l: int, table: int, keep: Tensor | None = None, *, per: int = 1) -> RearrangePlan:  # noqa: E741
    """Trunk tokens, position table (1 + l), time table (`table`) and CLS (1) -> the branch's first tokens.

    A patch is x + P[1 + patch] + E[frame]; the CLS is half the mean of the trunk's and half of its own with P[0].
    """
    index = torch.arange(l * t)[None] if keep is None else keep
    sources = (t * per * (1 + l), 1 + l, table, 1)
    position, time, own = sources[0], sources[0] + sources[1], sum(sources[:3])
    rest = torch.cat(
        [
            _patch_rows(index, t, l, per),
            (position + 1 + index // t)[..., None],
            (time + index % t)[..., None],
        ],
        dim=-1,
    )
    first = torch.cat([_cls_rows(t, l, per), torch.tensor([position, own])])
    first_weight = torch.tensor([0.5 / (t * per)] * (t * per) + [0.5, 0.5])
    return _rows("start_rows", first, first_weight, rest, torch.tensor([1.0 / per] * per + [1.0, 1.0]), sources)


def fuse_rows(t: int, l: int, keep: Tensor | None = None, *, per: int = 1) -> RearrangePlan:  # noqa: E741
    """Trunk tokens -> branch tokens: the mean of the CLS rows, then the patches (those of `keep` [b k])."""
    index = torch.arange(l * t)[None] if keep is None else keep
    first_weight = torch.full((t * per,), 1.0 / (t * per))
    rest = _patch_rows(index, t, l, per)
    rest_weight = torch.full((per,), 1.0 / per)
    return _rows("fuse_rows", _cls_rows(t, l, per), first_weight, rest, rest_weight, (t * per * (1 + l),))


def merge_video(t: int, l: int, per: int) -> RearrangePlan:  # noqa: E741
    """Trunk and branch tokens -> l + 1 tokens of the video: half the mean of each over time, the CLS last."""
    trunk = t * per * (1 + l)
    patch = torch.arange(l)[:, None]
    of_trunk = torch.arange(t * per) * (1 + l) + 1 + patch
    of_branch = trunk + 1 + patch * t + torch.arange(t)
    cls = torch.cat([_cls_rows(t, l, per), torch.tensor([trunk])])
    idx = torch.cat([torch.cat([of_trunk, of_branch], dim=1).flatten(), cls])
    share = torch.tensor([0.5 / (t * per)] * (t * per))
    weight = torch.cat([torch.cat([share, torch.full((t,), 0.5 / t)]).repeat(l), share, torch.tensor([0.5])])
    fan = t * per + t
    ptr = torch.cat([torch.arange(l + 1) * fan, torch.tensor([l * fan + t * per + 1])])
    return csr("merge_video", ptr, idx, weight, (trunk, 1 + l * t))


def merge_frames(t: int, l: int) -> RearrangePlan:  # noqa: E741
    """Trunk and branch tokens -> t (1 + l) tokens: half of each, the branch's CLS beside that of every frame."""
    trunk = t * (1 + l)
    place = torch.arange(1 + l)
    of_branch = trunk + torch.where(place > 0, 1 + (place - 1) * t, 0) + torch.arange(t)[:, None] * (place > 0)
    idx = torch.stack([torch.arange(trunk), of_branch.flatten()], dim=1).flatten()
    return csr("merge_frames", torch.arange(trunk + 1) * 2, idx, torch.full((2 * trunk,), 0.5), (trunk, 1 + l * t))
