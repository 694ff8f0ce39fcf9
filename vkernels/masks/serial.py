"""VideoMask to plain data and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkernels.check import require
from vkernels.masks.attributes import Attribute, Axis, Blocks, Ids, Position, Relation, Segment
from vkernels.masks.grid import Grid
from vkernels.masks.video_mask import VideoMask


def to_dict(mask: VideoMask) -> dict[str, Any]:
    def bits(keep: Tensor | None) -> Any:
        return None if keep is None else keep.int().tolist()

    segments = [
        {
            "tokens": segment.tokens,
            "globals": segment.globals,
            "relations": [{**_attribute(r.attribute), "lo": r.lo, "hi": r.hi} for r in segment.relations],
        }
        for segment in mask.segments
    ]
    return {"segments": segments, "keep_k": bits(mask.keep_k), "keep_q": bits(mask.keep_q), "repr": repr(mask)}


def _attribute(attribute: Attribute) -> dict[str, Any]:
    if isinstance(attribute, Axis):
        return {"axis": attribute.axis, "grid": list(attribute.grid.shape)}
    if isinstance(attribute, Position):
        return {"position": attribute.tokens}
    if isinstance(attribute, Blocks):
        return {"blocks": list(attribute.lengths)}
    return {"keys": attribute.keys.tolist()}


def from_dict(data: dict[str, Any]) -> VideoMask:
    known = isinstance(data, dict) and "segments" in data
    require(known, "from_dict", "data", "be what VideoMask.to_dict wrote", type(data).__name__, TypeError)
    segments = []
    for entry in data["segments"]:
        relations = []
        for relation in entry["relations"]:
            lo, hi = relation["lo"], relation["hi"]
            require(lo <= 0 <= hi, "from_dict", "relation", "contain 0", (lo, hi))
            attribute = _from_entry(relation)
            require(attribute.tokens == entry["tokens"], "from_dict", "relation", "cover its segment", attribute.tokens)
            relations.append(Relation(attribute, lo, hi))
        segments.append(Segment(entry["tokens"], tuple(relations), entry["globals"]))
    mask = VideoMask(tuple(segments), expression=data.get("repr", "VideoMask(...)"))
    keeps = []
    for name in ("keep_k", "keep_q"):
        rows = data.get(name)
        keep = None if rows is None else torch.tensor(rows, dtype=torch.bool).reshape(len(rows), -1)
        if keep is not None:
            require(keep.shape[1] == mask.tokens, "from_dict", name, f"have {mask.tokens} tokens", keep.shape[1])
        keeps.append(keep)
    return VideoMask(mask.segments, keeps[0], keeps[1], repr(mask))


def _from_entry(entry: dict[str, Any]) -> Attribute:
    if "axis" in entry:
        return Axis(Grid(*entry["grid"]), entry["axis"])
    if "position" in entry:
        return Position(entry["position"])
    if "blocks" in entry:
        return Blocks(tuple(entry["blocks"]))
    keys = torch.tensor(entry["keys"], dtype=torch.int32).reshape(len(entry["keys"]), -1)
    return Ids(keys, bool((keys[:, 1:] >= keys[:, :-1]).all()))
