"""What the ranks do with the trainer. Every function runs on each of them with the same arguments."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.multiprocessing as mp
from vkernels_video import train
from vkernels_video.jobs import JOBS
from vkernels_video.train import Run

STEPS = 3


def trained(what: str, **changes) -> tuple[list[dict[str, float]], np.ndarray]:
    """All losses of three steps, and the gradients of the first, on however many ranks there are."""
    run = Run(replace(JOBS[what].recipe, steps=STEPS, warm_up=1, sight=0, **changes))
    losses, grads = [run.advance()], [p.grad for p in run.model.parameters()]
    first = np.concatenate([grad.flatten().numpy().copy() for grad in grads if grad is not None])
    losses += [run.advance() for _ in range(STEPS - 1)]
    return losses, first


def torchrun(folder: Path, *arguments: str, world: int = 2) -> list[int | None]:
    """The command on ranks as torchrun starts them, each told to write to a folder of its own; their exit codes."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    context = mp.get_context("forkserver")
    started = []
    for rank in range(world):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_command, args=(told, ["--out", str(folder / f"{rank}"), *arguments]))
        process.start()
        started.append(process)
    for process in started:
        process.join(120)
        process.kill()
    return [process.exitcode for process in started]


def _command(told: dict[str, object], arguments: list[str]) -> None:
    os.environ.update({name: str(value) for name, value in told.items()}, TORCHELASTIC_RUN_ID="test")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    raise SystemExit(train.main(arguments))
