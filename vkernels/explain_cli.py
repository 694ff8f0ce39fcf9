"""python -m vkernels explain OP: which backend would run a call of these sizes, what it is cut to, what it costs.

    python -m vkernels explain attention --q 1,8192,16,64 --mask frame_causal:32,16,16 --on h200 cpu
    python -m vkernels explain decode_attention --case llama_int4 --on rtx4090
    python -m vkernels explain rearrange --list

Tensors are never filled, so sizes cost nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vkernels import rearrangement
from vkernels.check import NoBackend
from vkernels.explain import Explanation, explain, spec_of
from vkernels.kv_cache import BITS, FULL, KVCache
from vkernels.masks import Grid, VideoMask
from vkernels.roofline import STATED, ceiling
from vkernels.rope import RopeSpec
from vkernels.spec import Blank, Case, Maker, OpSpec, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHIPS = {"h200": "sm90", "h100": "sm90", "a100": "sm80", "rtx4090": "sm89"}
SIZES = {"q": "b,s,n,d", "k": "b,s,m,d", "x": "b,s,c", "grid": "t,h,w"}  # how a person says an argument's shape
PLANS = ("frames", "temporal", "temporal_back", "spatial", "spatial_back", "interleave_clips", "deal_clips", "window",
         "merge_order", "pool", "newline")  # fmt: skip


class Unsaid(ValueError):
    """What was asked is no call; the sentence says why."""


def _numbers(flag: str, text: str, form: str) -> list[int]:
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or (form and len(numbers) != len(form.split(","))) or min(numbers) < 0:
        raise Unsaid(f"explain: --{flag} must be {form or 'numbers'}, such as --{flag} {_example(form)}, got {text}")
    return numbers


def _example(form: str) -> str:
    return {"b,s,n,d": "1,8192,16,64", "b,s,m,d": "1,8192,4,64", "b,s,c": "1,4096,3584", "t,h,w": "8,16,16"}.get(
        form, ",".join("8" for _ in form.split(","))
    )


# name -> (what it is followed by, the mask of those numbers)
MASKS: dict[str, tuple[str, Callable[..., VideoMask]]] = {
    "joint": ("t,h,w", lambda *n: VideoMask.joint(Grid(*n))),
    "spatial": ("t,h,w", lambda *n: VideoMask.spatial(Grid(*n))),
    "temporal": ("t,h,w", lambda *n: VideoMask.temporal(Grid(*n))),
    "frame_causal": ("t,h,w", lambda *n: VideoMask.frame_causal(Grid(*n))),
    "causal": ("s", lambda n: VideoMask.causal(n)),
    "window": ("t,h,w,dt,dh,dw", lambda *n: VideoMask.window(Grid(*n[:3]), n[3:])),
    "cu_seqlens": ("", lambda *n: VideoMask.from_cu_seqlens(n)),
}


def _mask(text: str) -> VideoMask:
    """NAME:NUMBERS, and +keep:SHARE where that share of the tokens is kept, drawn at random."""
    said, _, share = text.partition("+keep:")
    name, _, numbers = said.partition(":")
    if name not in MASKS:
        raise Unsaid(f"explain: --mask must be one of {', '.join(MASKS)}, such as frame_causal:8,16,16, got {text}")
    form, make = MASKS[name]
    mask = make(*_numbers(f"mask {name}:", numbers, form))
    if not share:
        return mask
    try:
        kept = float(share)
    except ValueError:
        raise Unsaid(f"explain: --mask +keep must be a share such as 0.5, got {share}") from None
    draw = torch.rand(mask.tokens, generator=torch.Generator().manual_seed(0))
    return mask.keep(draw < kept, queries=True)


def _plan(text: str) -> Any:
    name, _, rest = text.partition(":")
    if name == "einops":
        return rearrangement.from_einops(rest)
    if name not in PLANS:
        raise Unsaid(
            f"explain: --plan must be one of einops, {', '.join(PLANS)}, such as pool:64,27,27 or "
            f"'einops:b t c -> t b c', got {text}"
        )
    try:
        return getattr(rearrangement, name)(*_numbers("plan", rest, ""))
    except TypeError:
        rule = f"have the numbers of vkernels.rearrangement.{name}"
        raise Unsaid(f"explain: --plan {name} must {rule}, got {rest}") from None


class Asked:
    """The sizes on the command line, as arguments of a call."""

    def __init__(self, op: str, given: dict[str, str | None], maker: Maker):
        self.op, self.maker = op, maker
        self.given = {name: text for name, text in given.items() if text is not None}
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def text(self, name: str, otherwise: str | None = None) -> str:
        self.used.add(name)
        if name not in self.given and otherwise is None:
            shape = f" {SIZES[name]}" if name in SIZES else ""
            raise Unsaid(f"explain: {self.op} must be given --{name}{shape}, or --case ID (--list shows them)")
        return self.given.get(name, otherwise or "")

    def sizes(self, name: str) -> list[int]:
        form = "" if name == "x" else SIZES[name]  # rearrange takes any rank
        return _numbers(name, self.text(name), form)

    def tensor(self, name: str) -> torch.Tensor:
        return self.maker.randn(*self.sizes(name))

    def finish(self, call: dict[str, Any]) -> dict[str, Any]:
        if left := sorted(set(self.given) - self.used):
            raise Unsaid(f"explain: {self.op} must be asked without --{' --'.join(left)}, which it has no use for")
        return call


def _qkv(a: Asked) -> dict[str, Any]:
    q = a.tensor("q")
    k = a.tensor("k") if "k" in a else q
    return {"q": q, "k": k, "v": torch.empty_like(k)}


def _attention(a: Asked) -> dict[str, Any]:
    return {**_qkv(a), "mask": _mask(a.text("mask")) if "mask" in a else None}


def _divided(a: Asked) -> dict[str, Any]:
    q = _qkv(a)
    grid = Grid(*a.sizes("grid"))
    return {**q, "grid": grid, "axis": a.text("axis", "temporal"), "cls": q["q"].shape[1] - grid.tokens}


def _rope(a: Asked) -> dict[str, Any]:
    q = a.tensor("q")
    k = a.tensor("k") if "k" in a else None
    return {"q": q, "k": k, "spec": RopeSpec.build(q.shape[3]), "pos": torch.arange(q.shape[1])}


def _prologue(a: Asked) -> dict[str, Any]:
    (b, s, n, d), m = a.sizes("q"), a.sizes("k")[2] if "k" in a else None
    m = n if m is None else m
    qkv = a.maker.randn(b, s, (n + 2 * m) * d)
    return {"qkv": qkv, "n": n, "m": m, "spec": RopeSpec.build(d), "pos": torch.arange(s)}


def _cache(a: Asked, b: int, length: int, m: int, d: int) -> KVCache:
    default = next(name for name, dtype in FULL.items() if dtype == a.maker.dtype)
    scheme = a.text("cache", default)
    if scheme not in (*FULL, *BITS):
        raise Unsaid(f"explain: --cache must be one of {', '.join((*FULL, *BITS))}, got {scheme}")
    return KVCache(scheme, b=b, m=m, d=d, capacity=length, dtype=a.maker.dtype)


def _append(a: Asked) -> dict[str, Any]:
    b, s, m, d = a.sizes("k")
    cache = _cache(a, b, s, m, d)
    k, v = (torch.empty(b, s, m, d, dtype=cache.dtype) for _ in "kv")
    return {"cache": cache, "k": k, "v": v}


def _decode(a: Asked) -> dict[str, Any]:
    b, s, m, d = a.sizes("k")
    cache = _cache(a, b, s, m, d)
    cache.advance(s)
    return {"q": a.tensor("q"), "cache": cache}


def _rearrange(a: Asked) -> dict[str, Any]:
    x, plan = a.tensor("x"), _plan(a.text("plan"))
    fills = getattr(plan, "fills", 0)
    return {"x": x, "plan": plan, **({"fill": a.maker.randn(fills, x.shape[-1])} if fills else {})}


CALLS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "attention": _attention,
    "divided_attention": _divided,
    "apply_rope": _rope,
    "qkv_prologue": _prologue,
    "kv_append": _append,
    "decode_attention": _decode,
    "rearrange": _rearrange,
}


def _cases(spec: OpSpec) -> dict[str, Case]:
    """By name; where a real size and a small case share one, the real size."""
    return {case.id: case for case in (*spec.cases, *spec.shapes)}


def _listed(spec: OpSpec) -> Iterator[str]:
    for id, case in _cases(spec).items():
        yield f"  {id:22} {case.model or 'a real size' if isinstance(case, Shape) else 'small, of the tests'}"


def _time(seconds: float) -> str:
    scale, unit = next((x for x in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= x[0]), (1e-6, "us"))
    return f"{seconds / scale:.3g} {unit}"


def table(call: Explanation, machines: Sequence[str]) -> Iterator[str]:
    """The least time on every machine, and what decides it."""
    rows = [("machine", "at best", "bound by", "ceilings")]
    for name in machines:
        at = ceiling(name)
        work = (call.flop, call.bytes, call.dtype)
        how = "measured" if at.measured else "stated"
        rows.append((at.machine, _time(at.time_s(*work)), at.bound(*work), how))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vkernels explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", help=f"one of {', '.join(CALLS)}")
    sizes = parser.add_argument_group("the call: its sizes, or a case by name")
    sizes.add_argument("--q", help="b,s,n,d: queries")
    sizes.add_argument("--k", help="b,s,m,d: keys, values like them; of decode_attention, what the cache holds")
    sizes.add_argument("--mask", help="frame_causal:8,16,16, temporal:t,h,w, window:t,h,w,dt,dh,dw, ...[+keep:0.5]")
    sizes.add_argument("--grid", help="t,h,w: of divided_attention; a token more than it holds is a CLS")
    sizes.add_argument("--axis", help="temporal (default) or spatial")
    sizes.add_argument("--cache", help="int4, int8, bf16, ...: the scheme of the KV cache")
    sizes.add_argument("--x", help="b,s,c or any other rank: what rearrange moves")
    sizes.add_argument("--plan", help="pool:64,27,27, temporal:8,256, 'einops:b t c -> t b c', ...")
    sizes.add_argument("--case", help="a case of the op by name")
    sizes.add_argument("--list", action="store_true", help="the op's cases")
    parser.add_argument("--dtype", choices=[*DTYPES], help="default: what the case has, else bf16")
    parser.add_argument("--on", nargs="+", default=["cpu"], choices=["cpu", *STATED], help="whose roofline")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="who runs it; default: what the first of --on is")
    parser.add_argument("--backend", help="ask for one")
    return parser


def _call(arguments: argparse.Namespace, spec: OpSpec) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in ("q", "k", "mask", "grid", "axis", "cache", "x", "plan")}
    case = _cases(spec).get(arguments.case)
    default = case.dtypes[0] if isinstance(case, Shape) else torch.bfloat16
    maker = Blank(DTYPES[arguments.dtype] if arguments.dtype else default)
    if arguments.case is None:
        asked = Asked(spec.name, given, maker)
        return asked.finish(CALLS[spec.name](asked))
    if case is None:
        raise Unsaid(f"explain: --case must be one of {', '.join(_cases(spec))}, got {arguments.case}")
    if said := [name for name, text in given.items() if text is not None]:
        raise Unsaid(f"explain: --case must come without sizes, got --{' --'.join(said)}")
    return case.make(maker)


def main(argv: Sequence[str] | None = None) -> int:
    """0: explained; 2: it is no call, and a sentence says why."""
    arguments = _parser().parse_args(argv)
    device = arguments.device or ("cpu" if arguments.on[0] == "cpu" else "cuda")
    chip = next((CHIPS[name] for name in arguments.on if name in CHIPS), "sm90") if device == "cuda" else None
    try:
        spec = spec_of(arguments.op)
        if arguments.list:
            print("\n".join([f"{spec.name}:", *_listed(spec)]))
            return 0
        call = _call(arguments, spec)
        machine = arguments.on[0]
        said = explain(spec.name, machine=machine, chip=chip, backend=arguments.backend, **call)
    except (ValueError, TypeError, NoBackend) as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        print(f"explain: the tensors must fit the memory that this machine may promise, got {error}", file=sys.stderr)
        return 2
    print("\n".join([*said.lines(), *table(said, arguments.on)]))
    return 0
