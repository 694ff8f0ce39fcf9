"""What a scheme sends: the written model, which the tests count after (docs/distributed.md)."""

from __future__ import annotations

from dataclasses import dataclass

from vkernels.distributed.shards import ShardPlan


@dataclass(frozen=True)
class Sent:
    """Bytes and messages one rank sends to others in a forward pass."""

    bytes: int
    messages: int


def forward_cost(scheme: str, shards: ShardPlan, rank: int, b: int, n: int, m: int, d: int, size: int) -> Sent:
    """Of `rank`, for heads of d elements of `size` bytes: n of queries, m of keys.

    ring and gather send each other rank the keys and values its queries see; heads sends it its share of the heads of
    q, k and v, and of the output, whose lse is float32.
    """
    others = [j for j in range(shards.world) if j != rank]
    if scheme in ("ring", "gather"):
        rows = [len(shards.needs[j][rank]) for j in others]
        return Sent(sum(rows) * 2 * b * m * d * size, sum(count > 0 for count in rows))
    own, share = len(shards.tokens[rank]), 1 / shards.world
    there = own * b * (n + 2 * m) * d * size * share
    back = [len(shards.tokens[j]) * b * n * share * (d * size + 4) for j in others]
    messages = 3 * len(others) * (own > 0) + 2 * sum(len(shards.tokens[j]) > 0 for j in others)
    return Sent(int(there * len(others) + sum(back)), messages)


def backward_cost(scheme: str, shards: ShardPlan, rank: int, b: int, n: int, m: int, d: int, size: int) -> Sent:
    """The same of a backward pass.

    ring sends keys and values again, and the gradients of those it asked for home; gather keeps them and sends the
    gradients; heads trades back what the forward traded.
    """
    others = [j for j in range(shards.world) if j != rank]
    if scheme in ("ring", "gather"):
        asked = [len(shards.needs[rank][j]) for j in others]
        home = Sent(sum(asked) * 2 * b * m * d * size, sum(count > 0 for count in asked))
        if scheme == "gather":
            return home
        again = forward_cost(scheme, shards, rank, b, n, m, d, size)
        return Sent(home.bytes + again.bytes, home.messages + again.messages)
    own, share = len(shards.tokens[rank]), 1 / shards.world
    there = own * b * n * share * (d * size + 4)
    back = [len(shards.tokens[j]) * b * (n + 2 * m) * d * size * share for j in others]
    messages = 2 * len(others) * (own > 0) + 3 * sum(len(shards.tokens[j]) > 0 for j in others)
    return Sent(int(there * len(others) + sum(back)), messages)


HIDDEN = 12_000  # FLOP per byte sent: 600 TFLOP/s of attention over one 400 Gbit/s port


def recommended(shards: ShardPlan, b: int, n: int, m: int, d: int, size: int) -> str:
    """ring where the busiest rank computes long enough to hide what it sends, even between nodes; else what sends less.

    A ring's messages travel while it attends; those of heads stand before and behind it.
    """

    def most(scheme: str) -> int:
        return max(forward_cost(scheme, shards, r, b, n, m, d, size).bytes for r in range(shards.world))

    divides = n % shards.world == 0 and m % shards.world == 0
    flop = 4.0 * max(shards.pairs, default=0) * n * d * b / shards.flat.samples
    if not divides or flop >= HIDDEN * most("ring"):
        return "ring"
    return min(("ring", "heads"), key=most)
