"""What is raced on a GPU: every real size the specs state, and the sizes and targets this library set itself.

Targets are stated for an NVIDIA H200; on another GPU they are printed and not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import vkernels as vk
from vkernels import rearrangement as plans
from vkernels.bench.problem import DeviceMaker, fill, with_contents
from vkernels.spec import Case, Maker, all_specs

BF16 = (torch.bfloat16,)


@dataclass(frozen=True)
class Target:
    """`value` of: "copy" share of the measured copy rate, "tflops", "us", or "ratio" to the rivals named so."""

    kind: str
    value: float
    rival: str = ""  # the beginning of rivals' names; "" means the fastest

    def __str__(self) -> str:
        shown = {"copy": f"{self.value:.0%} of copy", "tflops": f"{self.value:.0f} TFLOP/s", "us": f"{self.value:g} us"}
        return ("<= " if self.kind == "us" else ">= ") + shown.get(self.kind, f"{self.value:g}x {self.rival or 'best'}")


@dataclass(frozen=True)
class Race:
    """One case: `make(Maker)` gives the keyword arguments of the op's public function."""

    op: str
    id: str
    make: Callable[[Maker], dict[str, Any]]
    model: str = ""
    dtypes: Sequence[torch.dtype] = BF16
    gradients: bool = True
    forward: Target | None = None
    backward: Target | None = None
    visible: Callable[..., Any] | None = None  # FlexAttention's predicate (b, h, q, k)
    rank: int = 1  # what is left out first when time is short: the largest


def drawn_there(case: Case) -> Case:
    """`case` at a real size: its large tensors drawn on the device."""
    return dataclasses.replace(case, make=lambda maker: case.make(DeviceMaker(maker.dtype, maker.device)))


def _heads(m: Maker, b: int, s: int, n: int, d: int, names: str = "qkv") -> dict[str, Any]:
    return {name: m.randn(b, s, n, d) for name in names}


def _attention(id: str, b: int, s: int, n: int, d: int, mask: vk.VideoMask | None, **more: Any) -> Race:
    return Race("attention", id, lambda m: {**_heads(m, b, s, n, d), "mask": mask}, **more)


def _temporal(b: int, t: int, h: int, n: int, d: int, ratio: float, model: str) -> Race:
    """Short sequences over time of h x h places: the bytes decide."""
    grid = vk.Grid(t, h, h)
    return _attention(
        f"temporal T={t}, {h * h} places, d={d}", b, grid.tokens, n, d, vk.VideoMask.temporal(grid),
        model=model, forward=Target("copy", 0.8), backward=Target("ratio", ratio, "permute"), rank=0,
    )  # fmt: skip


def _frame_causal(t: int, side: int, n: int, d: int, forward: float, backward: float, rank: int = 1) -> Race:
    grid, frame = vk.Grid(t, side, side), side * side
    return _attention(
        f"frame-causal {grid.tokens:,}, d={d}", 1, grid.tokens, n, d, vk.VideoMask.frame_causal(grid),
        model=f"{t} frames in a video-LLM", forward=Target("tflops", forward), backward=Target("tflops", backward),
        visible=lambda b, h, q, k: k // frame <= q // frame, rank=rank,
    )  # fmt: skip


def _keep(share: float, s: int, ratio: float, queries: bool = True) -> Race:
    """Dropped tokens ask nothing either; without `queries` they only are not looked at."""
    dropped = torch.rand(s, generator=torch.Generator().manual_seed(0)) >= share
    mask = vk.VideoMask.joint(vk.Grid(1, 1, s)).keep(~dropped, queries=queries)
    id = f"keep {share:.0%} of {s:,}{'' if queries else ' keys'}"
    return _attention(id, 2, s, 16, 64, mask, forward=Target("ratio", ratio, "SDPA"), rank=0)


def _spatial(b: int, t: int, side: int, n: int, d: int, cls: int, target: Target, model: str) -> Race:
    grid = vk.Grid(t, side, side)

    def make(m: Maker) -> dict[str, Any]:
        return {**_heads(m, b, cls + grid.tokens, n, d), "grid": grid, "axis": "spatial", "cls": cls}

    id = f"spatial {side * side} + {cls}, {t} frames, d={d}"
    return Race("divided_attention", id, make, model=model, forward=target, rank=0)


def _decode(scheme: str, b: int, heads: tuple[int, int], d: int, keys: int, target: Target) -> Race:
    def make(m: Maker) -> dict[str, Any]:
        cache = vk.KVCache(scheme, b=b, m=heads[1], d=d, capacity=keys, dtype=m.dtype, device=m.device)
        cache.advance(keys)
        fill(cache)
        return {"q": m.randn(b, 1, heads[0], d), "cache": cache}

    id = f"decode {keys:,} keys, {heads[0]}/{heads[1]} heads, {scheme}"
    return Race("decode_attention", id, make, gradients=False, forward=target, rank=0)


def _rope(s: int, n: int, m: int, d: int) -> Race:
    spec = vk.RopeSpec.build(d)

    def make(maker: Maker) -> dict[str, Any]:
        q, k = maker.randn(1, s, n, d), maker.randn(1, s, m, d)
        return {"q": q, "k": k, "spec": spec, "pos": torch.arange(s, device=maker.device)}

    share = Target("copy", 0.9)
    return Race(
        "apply_rope", f"{s:,} tokens, {n}/{m} heads", make, "a 7B decoder", forward=share, backward=share, rank=0
    )


def _prologue(s: int, n: int, m: int, d: int) -> Race:
    spec = vk.RopeSpec.build(d)

    def make(maker: Maker) -> dict[str, Any]:
        qkv, norms = maker.randn(1, s, (n + 2 * m) * d), {x: maker.randn(d) for x in ("q_norm", "k_norm")}
        return {"qkv": qkv, "n": n, "m": m, "spec": spec, "pos": torch.arange(s, device=maker.device), **norms}

    return Race("qkv_prologue", f"norm + RoPE, {s:,} tokens, {n}/{m} heads", make, forward=Target("copy", 0.9), rank=0)


def _move(id: str, shape: tuple[int, ...], plan: Callable[[], Any]) -> Race:
    return Race(
        "rearrange", id, lambda m: {"x": m.randn(*shape), "plan": plan()}, forward=Target("copy", 0.9), rank=0
    )  # fmt: skip


def _lower(t: int, side: int) -> Race:
    frame = side * side

    def make(m: Maker) -> dict[str, Any]:
        return {"mask": lambda: vk.VideoMask.frame_causal(vk.Grid(t, side, side)), "device": m.device}

    return Race(
        "lower_mask", f"frame-causal {t * frame:,}", make, gradients=False, forward=Target("us", 20.0),
        visible=lambda b, h, q, k: k // frame <= q // frame,
    )  # fmt: skip


def own_races(small: bool = False) -> list[Race]:
    """The sizes with a target. `small`: the same programs at toy sizes, for the tests."""
    half, quarter = (0.5, 64, 3.6), (0.25, 64, 14.0)
    if small:
        return [
            _temporal(1, 4, 2, 2, 16, 5.0, "toy"),
            _spatial(1, 2, 3, 2, 16, 1, Target("ratio", 2.0, "split"), "toy"),
            _frame_causal(3, 2, 2, 16, 350, 300),
            _attention("dense 24, d=16", 1, 24, 2, 16, None, forward=Target("tflops", 500)),
            _keep(*half), _keep(*quarter), _keep(0.5, 64, 1.9, queries=False),
            _decode("bf16", 1, (4, 2), 16, 40, Target("copy", 0.7)),
            _decode("int4", 1, (2, 2), 64, 200, Target("ratio", 3.0)),
            _rope(16, 4, 2, 32), _prologue(12, 4, 2, 32),
            _move("permute", (2, 3, 4, 8), lambda: plans.from_einops("b t l c -> b l t c")), _lower(3, 2),
        ]  # fmt: skip
    return [
        _rope(16384, 32, 32, 128),
        _rope(32768, 32, 8, 128),
        _prologue(32768, 32, 8, 128),
        _move("t l c -> l t c, 268 MB", (8, 64, 256, 1024), lambda: plans.from_einops("b t l c -> b l t c")),
        _temporal(16, 8, 16, 16, 64, 5.0, "LanguageBind, BT-Adapter: 8 frames"),
        _temporal(16, 16, 16, 16, 88, 4.0, "ST-LLM's EVA ViT-g: 16 frames"),
        _temporal(4, 64, 16, 16, 64, 2.0, "BT-Adapter chat: 64 frames"),
        _spatial(8, 32, 16, 16, 64, 1, Target("tflops", 400), "CLIP ViT-L/14 with a shared CLS"),
        _spatial(8, 32, 16, 16, 64, 0, Target("tflops", 420), "ViT-L, 256 patches"),
        _spatial(8, 16, 24, 16, 64, 0, Target("tflops", 480), "CLIP ViT-L/14 at 336 pixels"),
        _spatial(4, 16, 32, 16, 64, 0, Target("tflops", 500), "ViT-L/14 at 448 pixels"),
        _attention(
            "dense 8,192, d=128", 1, 8192, 32, 128, None,
            forward=Target("tflops", 650), backward=Target("tflops", 560),
        ),
        _attention("dense 4,096, d=64", 4, 4096, 16, 64, None, forward=Target("tflops", 500)),
        _attention("dense 4,096, d=72", 4, 4096, 16, 72, None, forward=Target("ratio", 1.15), model="SigLIP-So400m"),
        _frame_causal(8, 16, 32, 128, 350, 300),
        _frame_causal(16, 16, 32, 128, 520, 420),
        _frame_causal(32, 16, 32, 128, 560, 450),
        _frame_causal(128, 16, 32, 128, 600, 480),
        _keep(0.5, 8192, 3.6),
        _keep(0.25, 8192, 14.0),
        _keep(0.5, 8192, 1.9, queries=False),
        _keep(0.25, 8192, 3.7, queries=False),
        _decode("bf16", 1, (32, 32), 128, 8224, Target("us", 36)),
        _decode("bf16", 1, (32, 32), 128, 16448, Target("us", 70)),
        _decode("bf16", 8, (32, 8), 128, 32768, Target("copy", 0.93)),
        _decode("int4", 1, (32, 32), 128, 16448, Target("ratio", 3.0, "SDPA")),
        _decode("int2", 1, (32, 32), 128, 16448, Target("ratio", 5.0, "SDPA")),
        _lower(32, 16),
    ]  # fmt: skip


def spec_races() -> list[Race]:
    """Every real size a spec states; a new op or size needs nothing here."""
    return [
        Race(
            spec.name, shape.id, with_contents(shape).make, shape.model, shape.dtypes, shape.gradients,
            forward=Target("copy", 0.9) if spec.name in MOVES else None,
        )
        for spec in all_specs() for shape in spec.shapes
    ]  # fmt: skip


MOVES = ("apply_rope", "qkv_prologue", "rearrange")  # judged by the copy rate from 256 MB on


def races() -> list[Race]:
    return sorted([*own_races(), *spec_races()], key=lambda race: race.rank)
