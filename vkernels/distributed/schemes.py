"""How keys, values and queries meet: `ring` brings keys part by part, `gather` all at once, `heads` trades tokens for
heads. All three move the rows a rank's queries see, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vkernels.distributed.exchange import ProcessGroup, Transfer, all_to_all
from vkernels.distributed.parts import to
from vkernels.distributed.shards import ShardPlan
from vkernels.library import op
from vkernels.masks import MaskPlan
from vkernels.merge import merge_attentions
from vkernels.ops.attention import attention
from vkernels.ops.attention.torch_op import mask_arguments


@dataclass(frozen=True, eq=False)
class Seat:
    """One rank's view of a deal: who sends it what, and the plans of its queries. Plans are kept per device."""

    shards: ShardPlan
    group: ProcessGroup
    me: int

    @property
    def world(self) -> int:
        return self.shards.world

    def asks(self, j: int) -> Tensor:
        """Rows of rank j's shard that this rank's queries see."""
        return self.shards.needs[self.me][j]

    def gives(self, j: int) -> Tensor:
        """Rows of this rank's shard that rank j's queries see."""
        return self.shards.needs[j][self.me]

    @cached_property
    def _plans(self) -> dict[Any, MaskPlan]:
        return {}

    def plan(self, queries: Tensor, keys: Tensor, key: Any, device: torch.device) -> MaskPlan:
        if (key, device) not in self._plans:
            self._plans[key, device] = to(self.shards.flat.part(queries, keys), device)
        return self._plans[key, device]

    def against(self, j: int, device: torch.device) -> MaskPlan:
        """This rank's queries against what rank j sends it (against all of its own)."""
        theirs = self.shards.tokens[j] if j == self.me else self.shards.tokens[j][self.asks(j)]
        return self.plan(self.shards.tokens[self.me], theirs, j, device)


# ---- ring


def ring(q: Tensor, k: Tensor, v: Tensor, scale: float, seat: Seat, backend: str) -> tuple[Tensor, Tensor]:
    return _Ring.apply(q, k, v, scale, seat, backend)  # type: ignore[no-any-return]


def _pack(k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Rows of keys and values as they travel: (rows 2 b m d)."""
    index = rows.to(k.device)
    return torch.stack([k.index_select(1, index), v.index_select(1, index)]).movedim(2, 0).contiguous()


def _unpack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(b rows m d) twice, views."""
    k, v = rows.movedim(0, 2)
    return k, v


def _fetch(k: Tensor, v: Tensor, seat: Seat, step: int, tag: int) -> tuple[Tensor, Transfer]:
    """Start what step `step` moves: keys and values to rank me + step, and from rank me - step."""
    after, before = (seat.me + step) % seat.world, (seat.me - step) % seat.world
    b, _, m, d = k.shape
    received = k.new_empty((len(seat.asks(before)), 2, b, m, d))
    sends = [(_pack(k, v, seat.gives(after)), after)]
    return received, Transfer(seat.group, sends, [(received, before)], tag)


class _Ring(torch.autograd.Function):
    """One part of the keys at a time; the next one travels while this one is attended to."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seat: Seat, backend: str
    ) -> tuple[Tensor, Tensor]:
        attend = op("attention_fwd", backend)
        b, s, n, _ = q.shape
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full((b, n, s), -torch.inf, dtype=torch.float32)
        coming = _fetch(k, v, seat, 1, 1) if seat.world > 1 else None
        for step in range(seat.world):
            j = (seat.me - step) % seat.world
            if step == 0:
                k_j, v_j = k, v
            else:
                assert coming is not None
                rows, transfer = coming
                transfer.wait()
                coming = _fetch(k, v, seat, step + 1, step + 1) if step + 1 < seat.world else None
                k_j, v_j = _unpack(rows)
            if s and k_j.shape[1]:
                plan = seat.against(j, q.device)
                part, part_lse = attend(q, k_j, v_j, scale, *mask_arguments(plan, s, k_j.shape[1]))
                out, lse = merge_attentions([out, part], [lse, part_lse])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.seat, ctx.backend = scale, seat, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        """Each part's gradient from the whole's lse; those of foreign keys travel home while the next part is done."""
        q, k, v, out, lse = ctx.saved_tensors
        seat, world = ctx.seat, ctx.seat.world
        attend = op("attention_bwd", ctx.backend)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq = torch.zeros_like(q, dtype=torch.float32)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        returning: list[tuple[int, Tensor, Transfer]] = []
        coming = _fetch(k, v, seat, 1, 1) if world > 1 else None
        for step in range(world):
            j, after = (seat.me - step) % world, (seat.me + step) % world
            if step == 0:
                k_j, v_j = k, v
            else:
                assert coming is not None
                rows, transfer = coming
                transfer.wait()
                coming = _fetch(k, v, seat, step + 1, step + 1) if step + 1 < world else None
                k_j, v_j = _unpack(rows)
            if q.shape[1] and k_j.shape[1]:
                arguments = mask_arguments(seat.against(j, q.device), q.shape[1], k_j.shape[1])
                dq_j, dk_j, dv_j = attend(dout, dlse, q, k_j, v_j, out, lse, ctx.scale, *arguments)
                dq += dq_j
            else:
                dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            if step == 0:
                dk += dk_j
                dv += dv_j
            else:
                home = torch.stack([dk_j, dv_j]).movedim(2, 0).contiguous()
                back = k.new_empty((len(seat.gives(after)), *home.shape[1:]))
                returning.append((after, back, Transfer(seat.group, [(home, j)], [(back, after)], world + step)))
        for j, back, transfer in returning:  # in the order of the steps, whatever arrived first
            transfer.wait()
            rows = seat.gives(j).to(k.device)
            for total, part in zip((dk, dv), _unpack(back), strict=True):
                total.index_add_(1, rows, part.to(total.dtype))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


# ---- gather


def gather(q: Tensor, k: Tensor, v: Tensor, scale: float, seat: Seat, backend: str) -> tuple[Tensor, Tensor]:
    k_all, v_all = _Gather.apply(k, v, seat)
    parts = [seat.shards.tokens[j][seat.asks(j)] for j in range(seat.world)]
    plan = seat.plan(seat.shards.tokens[seat.me], torch.cat(parts), "gather", q.device)
    return attention(q, k_all, v_all, mask=plan, scale=scale, return_lse=True, backend=backend)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """The keys and values a rank's queries see, from every rank, in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, seat: Seat) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.seat, ctx.shape = seat, k.shape
        parts = [_pack(k, v, seat.gives(j)) for j in range(seat.world)]
        counts = [len(seat.asks(j)) for j in range(seat.world)]
        return _unpack(torch.cat(all_to_all(parts, counts, seat.group)))

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        seat = ctx.seat
        home = torch.stack([dk, dv]).movedim(2, 0).contiguous()
        parts = home.split([len(seat.asks(j)) for j in range(seat.world)])
        counts = [len(seat.gives(j)) for j in range(seat.world)]
        totals = torch.zeros((2, *ctx.shape), dtype=torch.float32, device=dk.device)
        for j, back in enumerate(all_to_all(parts, counts, seat.group)):
            totals.index_add_(2, seat.gives(j).to(dk.device), back.movedim(0, 2).float())
        return totals[0].to(dk.dtype), totals[1].to(dv.dtype), None


# ---- heads


def heads(q: Tensor, k: Tensor, v: Tensor, scale: float, seat: Seat, backend: str) -> tuple[Tensor, Tensor]:
    order = seat.shards.order
    plan = seat.plan(order, order, "heads", q.device)
    q_all, k_all, v_all = (_TokensForHeads.apply(x, seat) for x in (q, k, v))
    out, lse = attention(q_all, k_all, v_all, mask=plan, scale=scale, return_lse=True, backend=backend)
    lse = _HeadsForTokens.apply(lse.transpose(1, 2)[..., None], seat)
    return _HeadsForTokens.apply(out, seat), lse[..., 0].transpose(1, 2)


def _to_heads(x: Tensor, seat: Seat) -> Tensor:
    """(b own n d) -> (b all n/world d), tokens in the order of the ranks."""
    share = x.shape[2] // seat.world
    parts = [part.transpose(0, 1).contiguous() for part in x.split(share, 2)]  # own b share d
    counts = [len(rows) for rows in seat.shards.tokens]
    return torch.cat(all_to_all(parts, counts, seat.group)).transpose(0, 1)


def _to_tokens(x: Tensor, seat: Seat) -> Tensor:
    """(b all n/world d) -> (b own n d)."""
    own = len(seat.shards.tokens[seat.me])
    parts = [part.transpose(0, 1).contiguous() for part in x.split([len(rows) for rows in seat.shards.tokens], 1)]
    back = all_to_all(parts, [own] * seat.world, seat.group)
    return torch.cat(back, 2).transpose(0, 1)


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seat: Seat) -> Tensor:  # type: ignore[override]
        ctx.seat = seat
        return _to_heads(x, seat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _to_tokens(grad, ctx.seat), None


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seat: Seat) -> Tensor:  # type: ignore[override]
        ctx.seat = seat
        return _to_tokens(x, seat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _to_heads(grad, ctx.seat), None


SCHEMES = {"ring": ring, "gather": gather, "heads": heads}
