"""Processes that stay: `Ranks(world).run(function, *args)` calls a function on every rank of a gloo group."""

from __future__ import annotations

import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What takes seconds to import; a server has it once and forks before any of it has run.
IMPORTED = [
    "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets", "rich.progress", "vkernels.distributed",
    "vkernels_video.train",
]  # fmt: skip


def _serve(rank: int, world: int, store: str, timeout: float, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(("done", function(*args)))
        except BaseException as error:  # a test may kill a rank by SystemExit
            pipe.send(("raised", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    os._exit(0)


class Ranks:
    def __init__(self, world: int, timeout: float = 60.0):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            store = f"{self.folder.name}/store"
            process = context.Process(target=_serve, args=(rank, world, store, timeout, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def start(self, function, *args, ranks=None):
        for rank in range(len(self.pipes)) if ranks is None else ranks:
            self.pipes[rank].send((function, args))

    def answer(self, rank: int, seconds: float = 120.0):
        assert self.pipes[rank].poll(seconds), f"rank {rank} says nothing for {seconds} s"
        return self.pipes[rank].recv()

    def run(self, function, *args) -> list:
        """What each rank returned; a rank's exception fails the test with its traceback."""
        self.start(function, *args)
        answers = [self.answer(rank) for rank in range(len(self.pipes))]
        for rank, (kind, value) in enumerate(answers):
            assert kind == "done", f"rank {rank}: {value}"
        return [value for _, value in answers]

    def refused(self, function, *args) -> list[str]:
        """The exceptions of a call that must fail on every rank."""
        self.start(function, *args)
        answers = [self.answer(rank) for rank in range(len(self.pipes))]
        assert all(kind == "raised" for kind, _ in answers), answers
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()
