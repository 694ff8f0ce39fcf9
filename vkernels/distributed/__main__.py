"""What context parallelism costs, from the written model: python -m vkernels.distributed

A frame-causal video in a decoder of 32 query and 8 key heads of 128, bfloat16. A frame's tokens move together, so the
deal is made over frames and multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

from vkernels.distributed.cost import HIDDEN, forward_cost
from vkernels.distributed.shards import ShardPlan, plan_shards
from vkernels.masks import VideoMask

N, M, D, SIZE, FRAME = 32, 8, 128, 2, 1024
SIZES = {"131k": 128, "1M": 1024, "8M": 8192}  # frames of FRAME tokens
WORLDS = (1, 2, 4, 8, 16, 32, 64)
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s one way per GPU: NVLink 4, one 400 Gbit/s port
RATE = 600e12  # FLOP/s of a good bfloat16 attention forward on an H100 or H200


@dataclass(frozen=True)
class Row:
    """One rank's forward pass of one layer, the busiest rank's."""

    flop: float
    ring: int  # bytes sent, ring and gather alike
    heads: int | None  # None: the ranks do not divide the key heads
    kept: int  # bytes of keys and values that gather holds at once

    @property
    def compute(self) -> float:
        return self.flop / RATE

    @property
    def recommended(self) -> str:
        hidden = self.flop >= HIDDEN * self.ring
        return "heads" if self.heads is not None and self.heads < self.ring and not hidden else "ring"

    @property
    def sent(self) -> int:
        return self.heads if self.recommended == "heads" and self.heads is not None else self.ring


def row(shards: ShardPlan) -> Row:
    def busiest(scheme: str) -> int:
        return max(forward_cost(scheme, shards, r, 1, N, M, D, SIZE).bytes for r in range(shards.world)) * FRAME

    kept = max(sum(len(rows) for rows in needs) for needs in shards.needs) * FRAME * 2 * M * D * SIZE
    flop = 4.0 * max(shards.pairs) * FRAME**2 * N * D
    return Row(flop, busiest("ring"), busiest("heads") if M % shards.world == 0 else None, kept)


COLUMNS = "tokens, GPUs, compute, ring and gather send, heads sends, gather holds, recommended, NVLink, InfiniBand"


def table(sizes: dict[str, int]) -> str:
    columns = COLUMNS.split(", ")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, frames in sizes.items():
        for world in WORLDS:
            r = row(plan_shards(VideoMask.causal(frames), world, chunk=max(frames // (world * 8), 1)))
            heads = "-" if r.heads is None else _bytes(r.heads)
            links = " | ".join(_hidden(r, rate) for rate in (NVLINK, INFINIBAND))
            lines.append(
                f"| {name} | {world} | {r.compute * 1e3:,.1f} ms | {_bytes(r.ring)} | {heads} | {_bytes(r.kept)} "
                f"| {r.recommended if world > 1 else 'none'} | {links} |"
            )
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 10 or count == 0 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _hidden(r: Row, rate: float) -> str:
    """How long the messages take; what a ring hides behind its compute is no cost."""
    time = r.sent / rate
    if not r.sent:
        return "0"
    note = " (hidden)" if r.recommended == "ring" and time <= r.compute else ""
    return f"{time * 1e3:,.1f} ms{note}"


if __name__ == "__main__":
    print(table(SIZES))
