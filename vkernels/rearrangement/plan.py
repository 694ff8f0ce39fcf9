"""RearrangePlan: output rows described by input rows. A value, made once, run on any payload.

Two forms. *Affine*: an axis pattern, no index memory. *Rows*: a CSR matrix over rows; `ptr` absent means that every
output row reads exactly one input row (`idx`, -1: none). The input rows of all sources are numbered in a row,
the fill vectors after them, so a newline token or a CLS embedding is an ordinary row number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vkernels.check import ShapeError
from vkernels.rearrangement.pattern import Pattern
from vkernels.remember import Form


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device)))


@dataclass(frozen=True, eq=False, repr=False)
class RearrangePlan:
    """Which input rows make each output row of a `[b, s, c]` tensor.

    Fields of the rows form (leading `p` is 1 for one plan shared by all samples, or b for a plan per sample):
        idx:     int32 (p, nnz): input row of every tap; without `ptr` one tap per output row and -1 for none
        ptr:     int32 (p, n_out + 1): taps of output row r are ptr[r] .. ptr[r + 1]; an empty row is zero
        weight:  float32 (p, nnz): tap weights, None for ones. Constants: they receive no gradient
        reduce:  "sum" or "max" over the taps
        sources: rows per sample of each input tensor
        fills:   rows of the fill tensor, numbered after the last source
        in_groups, out_groups: a sample may arrive or leave folded as `groups` consecutive entries of the batch axis
        whole:   the plan addresses all rows of the tensor, batch included (unpad, pad)
    """

    name: str
    sources: tuple[int, ...] = ()
    n_out: int = 0
    idx: torch.Tensor | None = None
    ptr: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    fills: int = 0
    reduce: str = "sum"
    in_groups: int = 1
    out_groups: int = 1
    whole: bool = False
    pattern: Pattern | None = None
    cu_seqlens: torch.Tensor | None = None
    _memo: dict = field(default_factory=dict)

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def is_affine(self) -> bool:
        return self.pattern is not None

    @property
    def n_in(self) -> int:
        """Input rows per sample, all sources together, fill vectors not counted."""
        return sum(self.sources)

    @property
    def is_gather(self) -> bool:
        """Every output row is one input row or nothing, so the plan also moves integers."""
        return self.pattern is not None or (self.ptr is None and self.weight is None)

    @property
    def samples(self) -> int:
        """Plans held: 1, or one per sample of the batch."""
        return 1 if self.idx is None else self.idx.shape[0]

    def __repr__(self) -> str:
        if self.pattern is not None:
            sizes = "".join(f", {n}={s}" for n, s in self.pattern.sizes)
            return f"RearrangePlan.{self.name}('{self.pattern}'{sizes})"
        taps = "" if self.ptr is None else f", {self.reduce} of {self.index.shape[-1]} taps"
        fills = f", {self.fills} fill" if self.fills else ""
        per = f", {self.samples} samples" if self.samples > 1 else ""
        rows = " + ".join(map(str, self.sources))
        return f"RearrangePlan.{self.name}({rows} rows -> {self.n_out}{taps}{fills}{per})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RearrangePlan):
            return NotImplemented
        same = all(
            getattr(self, f) == getattr(other, f)
            for f in ("sources", "n_out", "fills", "reduce", "in_groups", "out_groups", "whole", "pattern")
        )
        return same and all(_same(getattr(self, f), getattr(other, f)) for f in ("idx", "ptr", "weight"))

    def __hash__(self) -> int:
        return hash((self.sources, self.n_out, self.fills, self.reduce, self.pattern))

    @property
    def form(self) -> Any:
        """What the plan looks like, for `remembered` decisions."""
        if torch.compiler.is_compiling():
            return NotImplemented
        if "form" not in self._memo:
            plain = (self.sources, self.n_out, self.fills, self.reduce, self.in_groups, self.out_groups, self.whole)
            self._memo["form"] = Form(*plain, self.pattern, self.idx, self.ptr, self.weight)
        return self._memo["form"]

    def to(self, device: torch.device | str) -> RearrangePlan:
        """The same plan with its index tensors on `device`; copied once, then remembered."""
        key = ("device", str(device))
        if key in self._memo:
            return self._memo[key]
        moved = {
            f: getattr(self, f).to(device)
            for f in ("idx", "ptr", "weight", "cu_seqlens")
            if getattr(self, f) is not None
        }
        made = replace(self, **moved, _memo={})
        if not torch.compiler.is_compiling():
            self._memo[key] = made
        return made

    # ---- algebra -------------------------------------------------------------------------------------------------

    @property
    def inverse(self) -> RearrangePlan:
        """The plan that puts every row back; rows this plan never read become zero. Needs a gather that reads no row
        twice."""
        if self.pattern is not None:
            if self.pattern.repeats:
                raise ValueError(f"inverse: plan must read no row twice, got {self!r}; use .transpose for the sum")
            return RearrangePlan(self.name, pattern=self.pattern.inverse)
        if not self.is_gather or self.fills or len(self.sources) > 1:
            raise ValueError(f"inverse: plan must move single rows of one source, got {self!r}")
        idx = self.index
        p = idx.shape[0]
        place = torch.where(idx < 0, self.n_in, idx).long()
        rows = torch.arange(self.n_out, dtype=torch.int32, device=idx.device).expand(p, -1)
        back = torch.full((p, self.n_in + 1), -1, dtype=torch.int32, device=idx.device)
        back.scatter_(1, place, rows.contiguous())
        hits = torch.zeros(p, self.n_in + 1, dtype=torch.int32, device=idx.device)
        hits.scatter_add_(1, place, torch.ones_like(rows).contiguous())
        if bool((hits[:, :-1] > 1).any()):
            raise ValueError(f"inverse: plan must read no row twice, got {self!r}; use .transpose for the sum")
        return RearrangePlan(
            f"{self.name}.inverse",
            sources=(self.n_out,),
            n_out=self.n_in,
            idx=back[:, :-1].contiguous(),
            in_groups=self.out_groups,
            out_groups=self.in_groups,
            whole=self.whole,
        )

    @property
    def transpose(self) -> RearrangePlan:
        """The transposed matrix: output rows are summed back to the input rows (and fill rows) they came from. This is
        the backward. Built by a stable sort, so sums have one fixed order: no atomics."""
        if self.reduce == "max":
            raise ValueError(f"transpose: plan must be linear, got {self!r}")
        if self.pattern is not None:
            raise ValueError(
                f"transpose: an affine plan must be turned into rows first (plan.rows(shape)), got {self!r}"
            )
        ptr, idx, weight = self.transposed()
        return RearrangePlan(
            f"{self.name}.transpose",
            sources=(self.n_out,),
            n_out=self.n_in + self.fills,
            idx=idx,
            ptr=ptr,
            weight=weight,
            in_groups=self.out_groups,
            out_groups=self.in_groups,
            whole=self.whole,
        )

    def transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(ptr, idx, weight) of the transpose, memoised."""
        if torch.compiler.is_compiling():
            return transpose_csr(self.index, self.ptr, self.weight, self.n_in + self.fills, self.n_out)
        if "transposed" not in self._memo:
            self._memo["transposed"] = transpose_csr(
                self.index, self.ptr, self.weight, self.n_in + self.fills, self.n_out
            )
        return self._memo["transposed"]

    @property
    def index(self) -> torch.Tensor:
        """`idx` of a plan of rows; an affine plan is refused."""
        if self.idx is None:
            raise ValueError(f"rearrange: plan must have rows, got {self!r}; call plan.rows(shape)")
        return self.idx

    @property
    def starts(self) -> torch.Tensor:
        """`ptr`, also where it is implied: int32 (p, n_out + 1)."""
        if self.ptr is not None:
            return self.ptr
        return torch.arange(self.n_out + 1, dtype=torch.int32, device=self.index.device).expand(self.samples, -1)

    def rows(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> RearrangePlan:
        """An affine plan on an input of `shape` as a rows plan over the whole tensor; other plans as they are.

        The last factor must be the same on both sides: rows keep their elements.
        """
        if self.pattern is None:
            return self
        key = ("rows", tuple(shape), str(device))
        if key in self._memo:
            return self._memo[key]
        if not self.pattern.ins[-1] or self.pattern.ins[-1][-1] != (self.pattern.outs[-1] or ("",))[-1]:
            raise ShapeError(f"rearrange: plan must keep the last axis last to be a plan of rows, got {self!r}")
        names_in = [n for g in self.pattern.ins for n in g][:-1]
        sizes = self.pattern.learn(tuple(shape))
        n_in = 1
        for n in names_in:
            n_in *= sizes[n]
        index = torch.arange(n_in, dtype=torch.int32, device=device).view([sizes[n] for n in names_in])
        names_out = [n for g in self.pattern.outs for n in g][:-1]
        kept = [n for n in names_out if n in names_in]
        dropped = [i for i, n in enumerate(names_in) if n not in kept]
        index = index.permute([names_in.index(n) for n in kept] + dropped).reshape([sizes[n] for n in kept])
        for position, name in enumerate(names_out):
            if name not in names_in:
                index = index.unsqueeze(position)
        index = index.expand([sizes[n] for n in names_out]).reshape(1, -1).contiguous()
        made = RearrangePlan(self.name, sources=(n_in,), n_out=index.shape[1], idx=index, whole=True)
        if not torch.compiler.is_compiling():
            self._memo[key] = made
        return made

    def compose(self, then: RearrangePlan) -> RearrangePlan:
        """One plan that does this one, then `then`: `run(run(x, p), q) == run(x, p.compose(q))`."""
        return compose(self, then)

    def apply_index(self, values: torch.Tensor, fill: int = -1) -> torch.Tensor:
        """What the plan does to per-row integers (positions, labels, token ids, bits): `[..., n_in] -> [..., n_out]`.

        The last axis holds the rows of the first source; rows that come from another source, from a fill vector, from
        nowhere or from several taps hold `fill`. A plan per sample wants `values` of shape (b, n_in).
        """
        if self.pattern is not None:
            raise ValueError(f"apply_index: an affine plan must be turned into rows first, got {self!r}")
        n = values.shape[-1]
        if n != self.sources[0]:
            raise ShapeError(f"apply_index: values must have {self.sources[0]} rows, got {tuple(values.shape)}")
        idx = self.index
        if self.ptr is not None:
            ptr = self.ptr.long()
            single = ptr[:, 1:] - ptr[:, :-1] == 1
            if idx.shape[-1] == 0:
                idx = torch.full_like(ptr[:, 1:], -1)
            else:
                first = idx.long().gather(1, ptr[:, :-1].clamp(max=idx.shape[-1] - 1))
                idx = torch.where(single, first, -1)
        idx = idx.long()
        live = (idx >= 0) & (idx < n)
        safe = torch.where(live, idx, 0)
        if idx.shape[0] == 1:
            safe, live = safe[0], live[0]
            if n == 0:
                return values.new_full((*values.shape[:-1], self.n_out), fill)
            return torch.where(live, values[..., safe], torch.as_tensor(fill, dtype=values.dtype, device=values.device))
        if values.shape[0] != idx.shape[0] or values.dim() != 2:
            raise ShapeError(f"apply_index: values must have shape ({idx.shape[0]}, {n}), got {tuple(values.shape)}")
        fills = torch.as_tensor(fill, dtype=values.dtype, device=values.device)
        return torch.where(live, values.gather(1, safe), fills)


def gather(name: str, idx: Any, sources: tuple[int, ...], *, fills: int = 0, **more: Any) -> RearrangePlan:
    """A fan-in-1 plan from row numbers (a list, `[n_out]` or `[p, n_out]`)."""
    index = torch.as_tensor(idx)
    if index.dim() not in (1, 2) or (index.numel() and index.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"{name}: rows must be int32 or int64 (n_out) or (p n_out), got {index.dtype} {tuple(index.shape)}"
        )
    index = (index if index.dim() == 2 else index[None]).to(torch.int32).contiguous()
    _check_rows(name, index, sum(sources) + fills, -1)
    return RearrangePlan(name, sources=sources, n_out=index.shape[1], idx=index, fills=fills, **more)


def csr(
    name: str, ptr: Any, idx: Any, weight: Any, sources: tuple[int, ...], *, fills: int = 0, **more: Any
) -> RearrangePlan:
    """A plan from CSR arrays (lists, or tensors with or without the leading `p`)."""
    rows, taps = (torch.as_tensor(v).to(torch.int32) for v in (ptr, idx))
    rows = (rows if rows.dim() == 2 else rows[None]).contiguous()
    taps = (taps if taps.dim() == 2 else taps[None]).contiguous()
    if rows.dim() != 2 or taps.dim() != 2 or rows.shape[0] != taps.shape[0]:
        raise ValueError(f"{name}: ptr must have as many samples as idx, got {tuple(rows.shape)} {tuple(taps.shape)}")
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=torch.float32).reshape(taps.shape).contiguous()
    _check_rows(name, taps, sum(sources) + fills, 0)
    if rows.shape[1] < 1 or bool((rows.diff(dim=1) < 0).any()) or bool((rows[:, :1] != 0).any()):
        raise ValueError(f"{name}: ptr must start at 0 and never fall, got {rows.tolist()}")
    if bool((rows[:, -1] > taps.shape[1]).any()):
        raise ValueError(f"{name}: ptr must end within the {taps.shape[1]} taps, got {rows[:, -1].tolist()}")
    return RearrangePlan(
        name, sources=sources, n_out=rows.shape[1] - 1, idx=taps, ptr=rows, weight=weight, fills=fills, **more
    )


def _check_rows(name: str, idx: torch.Tensor, n: int, lowest: int) -> None:
    if idx.numel() == 0:
        return
    low, high = int(idx.min()), int(idx.max())
    if low < lowest or high >= n:
        raise IndexError(f"{name}: rows must lie in [{lowest}, {n - 1}], got {low if low < lowest else high}")


def transpose_csr(
    idx: torch.Tensor, ptr: torch.Tensor | None, weight: torch.Tensor | None, n_rows: int, n_out: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """CSR of the transpose, on the device of `idx`, without a host sync: a stable sort by input row. Taps of no row
    sort past the end."""
    p, nnz = idx.shape
    if ptr is None:
        row = torch.arange(nnz, dtype=torch.int32, device=idx.device).expand(p, -1)
    else:
        tap = torch.arange(nnz, dtype=torch.int32, device=idx.device).expand(p, -1).contiguous()
        row = torch.searchsorted(ptr[:, 1:].contiguous(), tap, right=True, out_int32=True)
    key = torch.where((idx < 0) | (row >= n_out), n_rows, idx)
    ordered, order = torch.sort(key, dim=1, stable=True)
    starts = torch.arange(n_rows + 1, dtype=torch.int32, device=idx.device).expand(p, -1).contiguous()
    t_ptr = torch.searchsorted(ordered.contiguous(), starts, out_int32=True)
    t_idx = row.gather(1, order).clamp(0, max(n_out - 1, 0)).contiguous()
    t_weight = None if weight is None else weight.gather(1, order).contiguous()
    return t_ptr, t_idx, t_weight


def compose(first: RearrangePlan, then: RearrangePlan) -> RearrangePlan:
    """See RearrangePlan.compose."""
    for plan in (first, then):
        if plan.pattern is not None:
            raise ValueError(f"compose: an affine plan must be turned into rows first (plan.rows(shape)), got {plan!r}")
    if then.sources != (first.n_out,):
        raise ShapeError(f"compose: then must take {first.n_out} rows of one source, got {then!r}")
    if first.whole != then.whole or first.out_groups != then.in_groups:
        raise ShapeError(f"compose: then must take the batch as {first!r} leaves it, got {then!r}")
    if "max" in (first.reduce, then.reduce) and not (
        (first.is_gather and bool((first.index >= 0).all())) or (then.is_gather and bool((then.index >= 0).all()))
    ):
        raise ValueError(f"compose: a max must be composed with a gather, got {first!r} and {then!r}")
    shared: dict[str, Any] = dict(
        sources=first.sources,
        fills=first.fills + then.fills,
        in_groups=first.in_groups,
        out_groups=then.out_groups,
        whole=first.whole,
        cu_seqlens=then.cu_seqlens,
    )
    name = f"{first.name}.{then.name}"
    total = first.n_in + first.fills
    a, b = first.index.long(), then.index.long()
    p = max(a.shape[0], b.shape[0])
    a, b = a.expand(p, -1), b.expand(p, -1)
    if first.ptr is None and first.weight is None:
        inner = torch.cat([a, torch.full((p, 1), -1, device=a.device)], 1)
        looked = inner.gather(1, torch.where((b >= 0) & (b < first.n_out), b, first.n_out))
        idx = torch.where(b >= first.n_out, total + b - first.n_out, looked).to(torch.int32)
        if then.ptr is None:
            return RearrangePlan(name, n_out=then.n_out, idx=idx, **shared)
        if bool((idx >= 0).all()):
            weight = None if then.weight is None else then.weight.expand(p, -1).contiguous()
            ptr = then.ptr.expand(p, -1).contiguous()
            return RearrangePlan(name, n_out=then.n_out, idx=idx, ptr=ptr, weight=weight, reduce=then.reduce, **shared)
    samples = [_compose_sample(first, then, sample) for sample in range(p)]
    longest = max(len(idx) for _, idx, _ in samples)
    ptr = torch.stack([s[0] for s in samples])
    idx = torch.stack([torch.nn.functional.pad(s[1], (0, longest - len(s[1]))) for s in samples])
    weight = None
    if first.weight is not None or then.weight is not None:
        weight = torch.stack([torch.nn.functional.pad(s[2], (0, longest - len(s[2]))) for s in samples])
    reduce = "max" if "max" in (first.reduce, then.reduce) else "sum"
    return RearrangePlan(name, n_out=then.n_out, idx=idx, ptr=ptr, weight=weight, reduce=reduce, **shared)


def _taps(plan: RearrangePlan, sample: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(start, count, idx, weight) of one sample in general CSR form, empty rows dropped."""
    k = sample if plan.samples > 1 else 0
    idx = plan.index[k].long()
    weight = torch.ones_like(idx, dtype=torch.float32) if plan.weight is None else plan.weight[k]
    if plan.ptr is None:
        ptr = torch.nn.functional.pad((idx >= 0).long().cumsum(0), (1, 0))
        return ptr, idx[idx >= 0], weight[idx >= 0]
    end = int(plan.ptr[k, -1])
    return plan.ptr[k].long(), idx[:end], weight[:end]


def _compose_sample(
    first: RearrangePlan, then: RearrangePlan, sample: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a_ptr, a_idx, a_weight = _taps(first, sample)
    b_ptr, b_idx, b_weight = _taps(then, sample)
    total = first.n_in + first.fills
    # A fill row of `then` is one more row of `first` that reads itself.
    a_ptr = torch.cat([a_ptr, a_ptr[-1] + 1 + torch.arange(then.fills, device=a_ptr.device)])
    a_idx = torch.cat([a_idx, total + torch.arange(then.fills, device=a_ptr.device)])
    a_weight = torch.cat([a_weight, a_weight.new_ones(then.fills)])
    fan = (a_ptr[1:] - a_ptr[:-1])[b_idx]
    start = torch.repeat_interleave(a_ptr[b_idx] - torch.nn.functional.pad(fan.cumsum(0), (1, 0))[:-1], fan)
    tap = start + torch.arange(len(start), device=start.device)
    ends = torch.nn.functional.pad(fan.cumsum(0), (1, 0))
    weight = a_weight[tap] * torch.repeat_interleave(b_weight, fan)
    return ends[b_ptr].to(torch.int32), a_idx[tap].to(torch.int32), weight
