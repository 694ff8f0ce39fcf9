"""One long clip, one question, several ranks: torchrun --nproc-per-node 2 examples/long_video_torchrun.py --check

The reference model's tokens are dealt to the ranks: each encodes its share of the clip, keeps its share of the keys and
values, and all of them get the same answer. One process per GPU (nccl), or per core where there is none (gloo). The
weights are random (seeded), so the answer means nothing; what it costs is real.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from vkernels_video.model import Generated, VideoLLM, VideoLLMConfig, preset
from vkernels_video.video import load_clip, preprocess

from vkernels import distributed as vd

QUESTION = "What happens in this video?"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, help="a video file (default: frames of noise)")
    parser.add_argument("--frames", type=int, default=384, help="of the clip (default: 384)")
    parser.add_argument("--preset", default="tiny", help="tiny: 10 tokens a frame; small: 257 (default: tiny)")
    parser.add_argument("--kv", default="none", help="cache: none, int8, int4, int2 (default: none)")
    parser.add_argument("--tokens", type=int, default=8, help="of the answer (default: 8)")
    parser.add_argument("--check", action="store_true", help="compare with one process, which rank 0 then is")
    return parser.parse_args()


def pixels(args: argparse.Namespace, side: int) -> torch.Tensor:
    """Frames [f 3 side side], the same on every rank."""
    if args.clip is not None:
        return preprocess(load_clip(args.clip, args.frames).frames, side)
    return torch.randn(args.frames, 3, side, side, generator=torch.Generator().manual_seed(0))


def answer(
    config: VideoLLMConfig, clip: torch.Tensor, tokens: int, mesh: dist.DeviceMesh | None
) -> tuple[Generated, float]:
    """The answer and its seconds. The mesh is the only difference between several processes and one."""
    model = VideoLLM(config, mesh=mesh).init_weights(seed=0).eval().to(clip.device)
    if mesh is not None:
        dist.barrier()
    began = time.perf_counter()
    return model.generate(clip, QUESTION, tokens), time.perf_counter() - began


def main() -> int:
    args = options()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    rank, world = mesh.get_rank(), mesh.size()

    config = preset(args.preset).with_options(kv=args.kv)
    clip = pixels(args, config.encoder.image).to(device)
    with vd.traffic() as sent:  # what this rank sends to others
        found, seconds = answer(config, clip, args.tokens, mesh)

    rows = [None] * world
    dist.all_gather_object(rows, (found.tokens, found.cache_bytes, sent.bytes, seconds))
    same = True
    if rank == 0:
        # The deal the model made for itself: tokens and visible pairs of every rank.
        shards = vd.plan_shards(found.prompt.mask(config.decoder.frame_attention), world)
        print(f"{len(clip)} frames, {found.prompt.length} tokens on {world} ranks, imbalance {shards.imbalance:.3f}")
        print(f"{'rank':>4} {'tokens':>7} {'visible pairs':>14} {'cache bytes':>12} {'bytes sent':>12} {'seconds':>8}")
        for r, (_, held, size, took) in enumerate(rows):
            print(f"{r:>4} {len(shards.tokens[r]):>7} {shards.pairs[r]:>14,} {held:>12,} {size:>12,} {took:>8.2f}")
        same = all(tokens == found.tokens for tokens, *_ in rows)
        print(f"answer {found.tokens}, {'the same' if same else 'NOT the same'} on every rank")
        if args.check:
            alone, took = answer(config, clip, args.tokens, mesh=None)
            away = float((alone.logits - found.logits).norm() / alone.logits.norm())
            verdict = "the same" if alone.tokens == found.tokens else "NOT the same"
            print(f"answer {alone.tokens}, {verdict}, by one process in {took:.2f} s; logits {away:.1e} apart")
            same = same and alone.tokens == found.tokens
    dist.barrier()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
