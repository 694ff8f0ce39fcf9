"""report/index.html: one self-contained page about one run of the demo. It loads nothing, from nowhere."""

from __future__ import annotations

import base64
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

import vkernels as vk
from vkernels_video.model.decoder import Prompt
from vkernels_video.video import Clip, jpeg

HERE = resources.files("vkernels_video")
SIDES = {"eager": "plain PyTorch", "vkernels": "vkernels", "compiled": "plain, compiled"}
STAGES = {
    "video": ("Read the clip", "PyAV; the same code on both sides"),
    "preprocess": ("Preprocess", "resize, crop, normalise; the same code on both sides"),
    "encoder": ("Encoder", "divided space-time layers"),
    "connector": ("Connector", "projector, frames back in order, text around them"),
    "prefill": ("Prefill", "decoder over the whole prompt, cache filled"),
    "decode": ("Decode", "per generated token"),
}
IMPLEMENTATIONS = (
    (
        "Attention over time",
        "einops permute to (patch, frame), F.scaled_dot_product_attention, permute back",
        'vk.divided_attention(axis="temporal"): the tokens stay where they are',
    ),
    (
        "Attention in a frame",
        "a batch of frames through F.scaled_dot_product_attention",
        'vk.divided_attention(axis="spatial")',
    ),
    (
        "Interleaved clips",
        "einops rearrange of the projected features",
        "vk.rearrange with RearrangePlan.interleave_clips",
    ),
    (
        "Rotary positions",
        "transformers' LlamaRotaryEmbedding and apply_rotary_pos_emb",
        "vk.apply_rope, one pass over queries and keys",
    ),
    (
        "Prefill mask",
        "transformers' create_causal_mask(block_sequence_ids=...): a dense mask for SDPA",
        'VideoMask.spans(within="frame"): O(N) intervals, no dense mask',
    ),
    (
        "Cache",
        "the same codes; every step dequantises the history, concatenates and calls SDPA",
        "vk.KVCache and vk.decode_attention straight on the codes",
    ),
    ("Everything else", "the same torch and transformers modules and the same weight tensors", "the same"),
)


def write(folder: Path, results: dict[str, Any], clip: Clip) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page(results, clip), encoding="utf-8")
    return path


def page(results: dict[str, Any], clip: Clip) -> str:
    sections = (_headline, _totals, _table, _patterns, _implementations, _tokens, _digits, _setup)
    body = "".join(section(results) for section in sections[:3]) + _frames(results, clip)
    body += "".join(section(results) for section in sections[3:])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>vkernels: {escape(clip.path.name)}</title><style>{_part('report.css')}</style></head>"
        f"<body><main>{body}</main><script>{_part('report.js')}</script></body></html>"
    )


def _part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _headline(results: dict[str, Any]) -> str:
    agreement, prompt, total = results["agreement"], results["prompt"], results["total_seconds"]
    equal = "identical" if agreement["tokens_equal"] else "different"
    memory = results["peak_bytes"]["eager"] / max(1, results["peak_bytes"]["vkernels"])
    before, spread = agreement["largest_logit_difference_prefill"], agreement["logit_spread"]
    tiles = (
        (
            f"{results['total_speedup']['vkernels']:.2f}×",
            "speed-up, whole model",
            f"{duration(total['eager'])} → {duration(total['vkernels'])}",
        ),
        (
            f"{memory:.1f}×",
            "peak memory, ratio",
            f"{size(results['peak_bytes']['eager'])} → {size(results['peak_bytes']['vkernels'])}",
        ),
        (
            f"{agreement['largest_logit_difference']:.0e}",
            "largest logit difference",
            f"{before:.0e} before the cache rounds, logits spread {spread:.2f}",
        ),
        (equal, "greedy tokens", f"{results['steps'] + 1} generated on each side"),
    )
    cards = "".join(f"<div class=tile><b>{v}</b><span>{k}</span><small>{d}</small></div>" for v, k, d in tiles)
    return (
        "<header><button id=theme type=button aria-label='Switch between light and dark'>◐</button>"
        "<p class=eyebrow>vkernels demo</p><h1>One clip, one video-LLM, two implementations</h1>"
        f"<p class=lead>{prompt['frames']} frames, {prompt['length']:,} tokens into the decoder, size "
        f"<b>{escape(results['config']['name'])}</b>, {results['dtype']}, "
        f"{results['machine']['threads']} CPU threads.</p>"
        f"<p class=note>{escape(results['note'])}</p></header><section class=tiles>{cards}</section>"
    )


def _totals(results: dict[str, Any]) -> str:
    stages = [stage for stage in results["stages"] if not stage["shared"]]
    longest = max(results["total_seconds"].values())
    bars = ""
    for side, total in results["total_seconds"].items():
        parts = "".join(
            f"<i class=s-{s['name']} style='width:{100 * s['seconds'][side] / longest:.3f}%' "
            f"data-tip='{STAGES[s['name']][0]}: {duration(s['seconds'][side])}'></i>"
            for s in stages
        )
        bars += (
            f"<div class=row><span>{SIDES[side]}</span><div class=stack>{parts}<em>{duration(total)}</em></div></div>"
        )
    names = {"decode": f"Decode, {results['steps']} steps"}
    legend = "".join(
        f"<span><i class=s-{s['name']}></i>{names.get(s['name'], STAGES[s['name']][0])}</span>" for s in stages
    )
    return f"<section><h2>Where the time goes</h2><div class=legend>{legend}</div>{bars}</section>"


def _table(results: dict[str, Any]) -> str:
    sides = list(results["total_seconds"])
    head = "".join(f"<th>{SIDES[s]}</th>" for s in sides)
    rows = ""
    for stage in results["stages"]:
        title, what = STAGES[stage["name"]]
        seconds = stage.get("per_token") or stage["seconds"]
        top = max(seconds.values())
        cells = "".join(_cell(side, duration(seconds[side]), seconds[side] / top) for side in sides)
        if stage["shared"]:
            cells += f"<td class=same colspan={2 * len(sides) - 1}>same code</td>"
        else:
            cells += "".join(f"<td class='num speed'>{stage['speedup'][s]:.2f}×</td>" for s in sides[1:])
            most = max(1, *stage["peak_bytes"].values())
            cells += "".join(_cell(s, size(stage["peak_bytes"][s]), stage["peak_bytes"][s] / most) for s in sides)
        rows += f"<tr><th scope=row>{title}<small>{what}</small></th>{cells}</tr>"
    speed = "".join(f"<th>{'speed-up' if s == 'vkernels' else 'compiled speed-up'}</th>" for s in sides[1:])
    memory = "".join(f"<th>{SIDES[s]}</th>" for s in sides)
    cache = results["kv_cache_bytes"]
    return (
        "<section><h2>Stage by stage</h2><div class=scroll><table class=stages><thead>"
        f"<tr><td></td><th colspan={2 * len(sides) - 1}>time</th><th colspan={len(sides)}>peak memory</th></tr>"
        f"<tr><td></td>{head}{speed}{memory}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class=fine>Times are medians of {results['repeats']} runs in which the sides take turns, after a first "
        "run of each that is not timed. Peak memory is what torch's allocator hands out above what the stage began "
        "with, temporaries inside operators included, read from the torch profiler in that first run; weights are not "
        f"in it. The {escape(results['config']['kv'])} cache of the whole prompt takes {size(cache['eager'])} on the "
        f"plain side and {size(cache['vkernels'])} on vkernels.</p></section>"
    )


def _cell(side: str, text: str, share: float) -> str:
    return f"<td class=num>{text}<i class='bar b-{side}' style='width:{100 * share:.1f}%'></i></td>"


def _frames(results: dict[str, Any], clip: Clip) -> str:
    capacity = results["config"]["encoder"]["frames"]
    clips = max(1, -(-len(clip.indices) // capacity))
    figures = ""
    for i, (number, frame) in enumerate(zip(clip.indices, clip.frames, strict=True)):
        data = base64.b64encode(jpeg(frame)).decode()
        group = i % clips
        figures += (
            f"<figure style='--clip:var(--c{group % 8})' data-clip={group}><img alt='frame {number}' "
            f"src='data:image/jpeg;base64,{data}'><figcaption>{number}<span>clip {group + 1}</span></figcaption>"
            "</figure>"
        )
    how = (
        f"The encoder was made for {capacity} frames. {len(clip.indices)} frames become {clips} interleaved clips, "
        "each spanning the whole video (a colour each; point at a frame to see its clip); afterwards the tokens are "
        "put back in the order of time."
        if clips > 1
        else f"The encoder was made for {capacity} frames and takes these as one clip."
    )
    source = f"{escape(clip.path.name)}, {clip.size[1]} × {clip.size[0]}, {clip.total} frames"
    return f"<section><h2>The frames</h2><p>{source}. {how}</p><div class=frames>{figures}</div></section>"


def _patterns(results: dict[str, Any]) -> str:
    config, prompt = results["config"], results["prompt"]
    frames, patches = 4, 5
    grid = vk.Grid(frames, 1, patches)
    if config["decoder"]["frame_attention"] == "causal":
        prefill, words = vk.VideoMask.causal(3 + frames * patches + 4), "Every token sees what came before it."
    else:
        spans: list[vk.Text | vk.Video] = [vk.Text(3), vk.Video(frames, 1, patches), vk.Text(4)]
        prefill = vk.VideoMask.spans(spans, within="frame")
        words = (
            "Text sees what came before it. The tokens of a frame see each other and all that came before the frame."
        )
    capacity, tokens = min(config["encoder"]["frames"], prompt["frames"]), prompt["tokens"]
    n = prompt["length"]
    sizes = {key: prompt[key] for key in ("before", "frames", "tokens", "after")}
    visible = Prompt(**sizes).visible_pairs(config["decoder"]["frame_attention"])
    drawn = (
        (
            "Encoder, over time",
            vk.VideoMask.temporal(grid),
            None,
            f"A patch sees itself in the other frames of its clip: here {capacity} keys for each of "
            f"{capacity * tokens:,} tokens.",
        ),
        (
            "Encoder, in space",
            vk.VideoMask.spatial(grid),
            None,
            f"A token sees its own frame: here {tokens} keys for each of {capacity * tokens:,} tokens.",
        ),
        (
            "Decoder, prefill",
            prefill,
            (3, frames * patches),
            f"{words} Here {n:,} tokens and {visible:,} of {n * n:,} pairs visible.",
        ),
    )
    figures = "".join(
        f"<figure>{_matrix(mask.dense(), patches, video)}<figcaption><b>{title}</b>{text}</figcaption></figure>"
        for title, mask, video, text in drawn
    )
    return (
        "<section><h2>Who sees whom</h2><p>The three patterns, drawn by the library from the masks themselves for "
        f"{frames} frames of {patches} tokens (a row is a query, a column a key, frame after frame; colours are "
        f"frames, grey is text).</p><div class=patterns>{figures}</div></section>"
    )


def _matrix(dense: Tensor, patches: int, video: tuple[int, int] | None) -> str:
    """A mask as an SVG: one square per visible pair, coloured by the frame of its key."""
    rows = dense.reshape(dense.shape[-2:]).tolist()
    n, (first, count) = len(rows), video or (0, len(rows))
    squares = ""
    for q, row in enumerate(rows):
        for k, visible in enumerate(row):
            if visible:
                kind = f"f{(k - first) // patches % 8}" if first <= k < first + count else "text"
                squares += f"<rect x={k} y={q} width=.9 height=.9 class={kind} />"
    lines = "".join(f"<path d='M{x} 0V{n}M0 {x}H{n}'/>" for x in range(first, first + count + 1, patches) if 0 < x < n)
    box = f"viewBox='-.3 -.3 {n + 0.5} {n + 0.5}'"
    return f"<svg {box} role=img aria-label='attention pattern'>{squares}<g>{lines}</g></svg>"


def _implementations(results: dict[str, Any]) -> str:
    causal = results["config"]["decoder"]["frame_attention"] == "causal"
    rows = ""
    for what, plain, fast in IMPLEMENTATIONS:
        if causal and what == "Prefill mask":
            plain, fast = "F.scaled_dot_product_attention(is_causal=True), no mask", "VideoMask.causal"
        rows += f"<tr><th scope=row>{what}</th><td>{escape(plain)}</td><td>{escape(fast)}</td></tr>"
    return (
        "<section><h2>What the sides do differently</h2><div class=scroll><table class=plain><thead><tr><td></td>"
        f"<th>plain PyTorch</th><th>vkernels</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _tokens(results: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{SIDES[side]}</th><td class=ids>{' '.join(f'<code>{t}</code>' for t in tokens)}</td></tr>"
        for side, tokens in results["tokens"].items()
    )
    return (
        "<section><h2>The generated tokens</h2><p>Prompt: the frames, then "
        f"“{escape(results['prompt']['text'])}” as bytes. The ids mean nothing, because the weights are random; that "
        "all sides choose the same ones is the point.</p>"
        f"<div class=scroll><table class=plain>{rows}</table></div></section>"
    )


def _digits(results: dict[str, Any]) -> str:
    if "missing" in results["digits"]:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(each['question'])}</th><td>{escape(each['answer'])}</td>"
        f"<td>{escape(each['truth'])}</td></tr>"
        for each in results["digits"]["asked"]
    )
    return (
        "<section><h2>Trained weights on films of digits</h2><p>A small model whose weights come with the package, "
        "each question about a film of handwritten digits it has not seen.</p><div class=scroll><table class=plain>"
        f"<thead><tr><td></td><th>answer</th><th>truth</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _setup(results: dict[str, Any]) -> str:
    config, machine, prompt = results["config"], results["machine"], results["prompt"]
    encoder, decoder = config["encoder"], config["decoder"]
    stretch = (
        f"; NTK-scaled rotary base {results['rotary_base']:,.0f} instead of {decoder['rope_theta']:,.0f}, because "
        f"{prompt['length']:,} tokens exceed the {decoder['context']:,} positions it was made for"
        if results["rotary_base"] != decoder["rope_theta"]
        else ""
    )
    facts = {
        "Encoder": f"{encoder['layers']} layers, width {encoder['width']}, {encoder['heads']} heads, "
        f"{encoder['image']} px / {encoder['patch']}, {prompt['tokens']} tokens per frame, "
        f"{encoder['frames']} frames per clip",
        "Decoder": f"{decoder['layers']} layers, width {decoder['width']}, {decoder['heads']} heads "
        f"({decoder['kv_heads']} for keys and values), {decoder['frame_attention']} inside a frame{stretch}",
        "Cache": f"{config['kv']}, groups of {config['kv_group']}, the newest {config['kv_residual']} or more tokens "
        "in full precision",
        "Prompt": f"{prompt['before']} + {prompt['frames']} × {prompt['tokens']} + {prompt['after']} = "
        f"{prompt['length']:,} tokens",
        "Weights": f"random, seed {results['seed']}, {results['dtype']}",
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; vkernels runs {machine['instruction_set']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "Command": results["command"],
        "Took": f"{results['seconds']:.0f} s in all",
    }
    rows = "".join(f"<tr><th scope=row>{k}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    table = f"<div class=scroll><table class=plain>{rows}</table></div>"
    return f"<section><h2>Configuration and machine</h2>{table}</section>"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def size(count: float) -> str:
    if count >= 1e7:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
