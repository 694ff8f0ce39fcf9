"""How keys, values and queries meet: `ring` brings keys part by part, `gather` all at once, `heads` trades tokens for
heads. All three move the rows a rank's queries see, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import custom_op, register_autograd, register_fake

from vkernels.distributed.exchange import HIDDEN, ProcessGroup, Transfer, all_to_all
from vkernels.distributed.parts import to
from vkernels.distributed.shards import ShardPlan
from vkernels.library import op
from vkernels.masks import MaskPlan
from vkernels.merge import merge_attentions
from vkernels.ops.attention.torch_op import mask_arguments


class Route(NamedTuple):
    """What a rank does in a scheme, as torch.compile may read it: numbers, and tensors on the device of the keys."""

    mask: tuple[Any, ...]  # of the queries that are here, against the keys that come; as the operators take it
    gives: tuple[int, ...]  # rows to each rank
    asks: tuple[int, ...]  # and from each
    rows: Any = None  # Tensor: of this rank's shard: those it gives, to one rank after the other


@dataclass(frozen=True, eq=False)
class Seat:
    """One rank's view of a deal: who sends it what, and the plans of its queries. Plans are kept per device."""

    shards: ShardPlan
    me: int

    @property
    def world(self) -> int:
        return self.shards.world

    @property
    def own(self) -> Tensor:
        return self.shards.tokens[self.me]

    def asks(self, j: int) -> Tensor:
        """Rows of rank j's shard that this rank's queries see."""
        return self.shards.needs[self.me][j]

    def gives(self, j: int) -> Tensor:
        """Rows of this rank's shard that rank j's queries see."""
        return self.shards.needs[j][self.me]

    @cached_property
    def _plans(self) -> dict[Any, MaskPlan]:
        return {}

    @cached_property
    def _routes(self) -> dict[Any, Route]:
        return {}

    def plan(self, queries: Tensor, keys: Tensor, key: Any, device: torch.device) -> MaskPlan:
        if (key, device) not in self._plans:
            self._plans[key, device] = to(self.shards.flat.part(queries, keys), device)
        return self._plans[key, device]

    def against(self, j: int, device: torch.device) -> MaskPlan:
        """This rank's queries against what rank j sends it (against all of its own)."""
        theirs = self.shards.tokens[j] if j == self.me else self.shards.tokens[j][self.asks(j)]
        return self.plan(self.own, theirs, j, device)

    def route(self, scheme: str, device: torch.device) -> Route:
        """Of `gather` or `heads`."""
        if (scheme, device) not in self._routes:
            self._routes[scheme, device] = (self._gathered if scheme == "gather" else self._traded)(device)
        return self._routes[scheme, device]

    def _gathered(self, device: torch.device) -> Route:
        ranks = range(self.world)
        keys = torch.cat([self.shards.tokens[j][self.asks(j)] for j in ranks])
        mask = mask_arguments(self.plan(self.own, keys, "gather", device), len(self.own), len(keys))
        gives, asks = (tuple(len(rows(j)) for j in ranks) for rows in (self.gives, self.asks))
        return Route(mask, gives, asks, torch.cat([self.gives(j) for j in ranks]).to(device))

    def _traded(self, device: torch.device) -> Route:
        """Tokens for heads: this rank's to everyone, and everyone's."""
        order = self.shards.order
        mask = mask_arguments(self.plan(order, order, "heads", device), len(order), len(order))
        return Route(mask, (len(self.own),) * self.world, tuple(map(len, self.shards.tokens)))


# ---- ring


def ring(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, name: str, seat: Seat, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return torch.ops.vkernels.ring(q, k, v, scale, backend, _keep(name), group.group_name)  # type: ignore[no-any-return]
    return _Ring.apply(q, k, v, scale, backend, seat, group)  # type: ignore[no-any-return]


def _pack(k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Rows of keys and values as they travel: (rows 2 b m d)."""
    return torch.stack([k.index_select(1, rows), v.index_select(1, rows)]).movedim(2, 0).contiguous()


def _unpack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(b rows m d) twice, views."""
    k, v = rows.movedim(0, 2)
    return k, v


def _fetch(k: Tensor, v: Tensor, seat: Seat, group: ProcessGroup, step: int, tag: int) -> tuple[Tensor, Transfer]:
    """Start what step `step` moves: keys and values to rank me + step, and from rank me - step."""
    after, before = (seat.me + step) % seat.world, (seat.me - step) % seat.world
    b, _, m, d = k.shape
    received = k.new_empty((len(seat.asks(before)), 2, b, m, d))
    sends = [(_pack(k, v, seat.gives(after).to(k.device)), after)]
    return received, Transfer(group, sends, [(received, before)], tag)


def _ring_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, seat: Seat, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """One part of the keys at a time; the next one travels while this one is attended to."""
    attend = op("attention_fwd", backend)
    b, s, n, _ = q.shape
    out = q.new_zeros(q.shape, dtype=torch.float32)
    lse = q.new_full((b, n, s), -torch.inf, dtype=torch.float32)
    coming = _fetch(k, v, seat, group, 1, 1) if seat.world > 1 else None
    for step in range(seat.world):
        j = (seat.me - step) % seat.world
        if step == 0:
            k_j, v_j = k, v
        else:
            assert coming is not None
            rows, transfer = coming
            transfer.wait()
            coming = _fetch(k, v, seat, group, step + 1, step + 1) if step + 1 < seat.world else None
            k_j, v_j = _unpack(rows)
        if s and k_j.shape[1]:
            plan = seat.against(j, q.device)
            part, part_lse = attend(q, k_j, v_j, scale, *mask_arguments(plan, s, k_j.shape[1]))
            out, lse = merge_attentions([out, part], [lse, part_lse])
    out = out.to(q.dtype)
    return out, lse


def _ring_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
    seat: Seat,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each part's gradient from the whole's lse; those of foreign keys travel home while the next part is done."""
    world = seat.world
    attend = op("attention_bwd", backend)
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dq = torch.zeros_like(q, dtype=torch.float32)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    returning: list[tuple[int, Tensor, Transfer]] = []
    coming = _fetch(k, v, seat, group, 1, 1) if world > 1 else None
    for step in range(world):
        j, after = (seat.me - step) % world, (seat.me + step) % world
        if step == 0:
            k_j, v_j = k, v
        else:
            assert coming is not None
            rows, transfer = coming
            transfer.wait()
            coming = _fetch(k, v, seat, group, step + 1, step + 1) if step + 1 < world else None
            k_j, v_j = _unpack(rows)
        if q.shape[1] and k_j.shape[1]:
            arguments = mask_arguments(seat.against(j, q.device), q.shape[1], k_j.shape[1])
            dq_j, dk_j, dv_j = attend(dout, dlse, q, k_j, v_j, out, lse, scale, *arguments)
            dq += dq_j
        else:
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        if step == 0:
            dk += dk_j
            dv += dv_j
        else:
            home = torch.stack([dk_j, dv_j]).movedim(2, 0).contiguous()
            back = k.new_empty((len(seat.gives(after)), *home.shape[1:]))
            returning.append((after, back, Transfer(group, [(home, j)], [(back, after)], world + step)))
    for j, back, transfer in returning:  # in the order of the steps, whatever arrived first
        transfer.wait()
        rows = seat.gives(j).to(k.device)
        for total, part in zip((dk, dv), _unpack(back), strict=True):
            total.index_add_(1, rows, part.to(total.dtype))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, seat: Seat, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        out, lse = _ring_forward(q, k, v, scale, backend, seat, group)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = scale, backend, seat, group
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return *_ring_backward(dout, dlse, *ctx.saved_tensors, *ctx.how), None, None, None, None


# A graph has the ring as one operator: there are no functional point-to-point calls. It knows its seat by name.

_seats: WeakValueDictionary[str, Seat] = WeakValueDictionary()
_kept: dict[str, Seat] = {}  # a graph may outlive the deal it was made for


def seat_of(shards: ShardPlan, me: int) -> tuple[str, Seat]:
    """The seat of a rank, and its name: equal in every process."""
    if me not in shards.seats:
        shards.seats[me] = Seat(shards, me)
    name = f"{shards.digest} {me}"
    _seats[name] = shards.seats[me]
    return name, shards.seats[me]


@torch.compiler.assume_constant_result
def _keep(name: str) -> str:
    _kept[name] = _seats[name]
    return name


_HOW = "float scale, str backend, str seat, str group"


@custom_op(
    "vkernels::ring",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor out, Tensor lse)",
    tags=HIDDEN,
)
def _ring(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, seat: str, group: str) -> tuple[Tensor, Tensor]:
    where = _kept[seat], _resolve_process_group(group)  # type: ignore[arg-type]
    out, lse = _ring_forward(q, k, v, scale, backend, *where)
    return out.contiguous(), lse.contiguous()


@custom_op(
    "vkernels::ring_backward",
    mutates_args=(),
    schema="(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_HOW}) -> (Tensor, Tensor, Tensor)",
    tags=HIDDEN,
)
def _ring_back(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
    seat: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    where = _kept[seat], _resolve_process_group(group)  # type: ignore[arg-type]
    dq, dk, dv = _ring_backward(dout, dlse, q, k, v, out, lse, scale, backend, *where)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.how = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    grads = torch.ops.vkernels.ring_backward(dout, dlse, *ctx.saved_tensors, *ctx.how)
    return *grads, None, None, None, None


def _like_ring(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, s, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, n, s), dtype=torch.float32)


register_fake("vkernels::ring", _like_ring)
register_fake("vkernels::ring_backward", lambda dout, dlse, *rest: tuple(x.new_empty(x.shape) for x in rest[:3]))
register_autograd("vkernels::ring", _backward, setup_context=_setup_context)


# ---- gather


def gather(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, route: Route, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    k_all, v_all = _Gather.apply(k, v, route, group)
    return op("attention_fwd", backend)(q, k_all, v_all, scale, *route.mask)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """The keys and values a rank's queries see, from every rank, in the order of the ranks."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, route: Route, group: ProcessGroup) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.route, ctx.group, ctx.shape = route, group, k.shape
        return _unpack(all_to_all(_pack(k, v, route.rows), route.gives, route.asks, group))

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        route = ctx.route
        home = torch.stack([dk, dv]).movedim(2, 0).contiguous()
        back = all_to_all(home, route.asks, route.gives, ctx.group).movedim(0, 2).float()
        totals = torch.zeros((2, *ctx.shape), dtype=torch.float32, device=dk.device)
        for rows, part in zip(route.rows.split(route.gives), back.split(route.gives, 2), strict=True):
            totals.index_add_(2, rows, part)  # rank after rank, each row once: the sum is the same every time
        return totals[0].to(dk.dtype), totals[1].to(dv.dtype), None, None


# ---- heads


def heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, route: Route, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    q_all, k_all, v_all = (_TokensForHeads.apply(x, route, group) for x in (q, k, v))
    out, lse = op("attention_fwd", backend)(q_all, k_all, v_all, scale, *route.mask)
    lse = _HeadsForTokens.apply(lse.transpose(1, 2)[..., None], route, group)
    return _HeadsForTokens.apply(out, route, group), lse[..., 0].transpose(1, 2)


def _to_heads(x: Tensor, route: Route, group: ProcessGroup) -> Tensor:
    """(b own n d) -> (b all n/world d), tokens in the order of the ranks."""
    world = len(route.gives)
    b, own, n, d = x.shape
    parts = x.unflatten(2, (world, n // world)).permute(2, 1, 0, 3, 4).contiguous()  # world own b share d
    return all_to_all(parts.view(world * own, b, n // world, d), route.gives, route.asks, group).transpose(0, 1)


def _to_tokens(x: Tensor, route: Route, group: ProcessGroup) -> Tensor:
    """(b all n/world d) -> (b own n d)."""
    world, own = len(route.gives), route.gives[0]
    b, _, share, d = x.shape
    back = all_to_all(x.transpose(0, 1).contiguous(), route.asks, route.gives, group)
    return back.view(world, own, b, share, d).permute(2, 1, 0, 3, 4).reshape(b, own, world * share, d)


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.route, ctx.group = route, group
        return _to_heads(x, route, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _to_tokens(grad, ctx.route, ctx.group), None, None


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, group: ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.route, ctx.group = route, group
        return _to_tokens(x, route, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _to_heads(grad, ctx.route, ctx.group), None, None


SCHEMES = ("ring", "gather", "heads")
