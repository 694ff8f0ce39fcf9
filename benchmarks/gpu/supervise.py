"""A stage as a process of its own. What it reports is kept even when it crashes, hangs or runs out of time: a wrong
kernel can take the whole CUDA context with it, and must not take the run."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "@vkernels "  # what begins a line of report; everything else is noise of the libraries below
ALWAYS = "*"  # every case from now on: a rival that hung once is not waited for again
SANITIZER = "========="  # what begins a line of compute-sanitizer


def emit(report: dict[str, Any]) -> None:
    """Called in a worker: one line, seen at once."""
    print(MARK + json.dumps(report), flush=True)


def cuda_tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: it is often installed and not on the path."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([os.path.join(home, "bin")] if home else []), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def run_within(
    command: Sequence[str], seconds: float, more_environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit status, what it said); None where `seconds` were too few: then nothing it started goes on."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd=ROOT, env=os.environ | (more_environment or {}), start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(seconds, 1.0))
        return process.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen, patience: float = 5.0) -> None:
    """Asked first: ninja's compilers are in groups of their own, which it ends when it is asked to end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + patience
        while time.monotonic() < until:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)


class Shares:
    """The GPU's memory among processes that run side by side: who asks first is served first."""

    def __init__(self, whole: float = 0.9):  # the rest is contexts
        self.left = whole
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def taken(self, share: float) -> Iterator[None]:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self.left >= share - 1e-9)
            self.left -= share
        try:
            yield
        finally:
            with self._changed:
                self.left += share
                self._changed.notify_all()


def _lines(stream: Any, into: queue.Queue) -> None:
    for line in stream:
        into.put(line)
    into.put(None)


@dataclass
class Noise:
    """What a process says besides its reports."""

    found: list[str] = field(default_factory=list)  # by the sanitizer: it names kernel and address first
    end: deque[str] = field(default_factory=lambda: deque(maxlen=3))

    def hear(self, line: str) -> None:
        words = line.removeprefix(SANITIZER).strip()
        if not line.startswith(SANITIZER):
            self.end.append(line.strip())
        elif words and len(self.found) < 4 and not words.startswith(("COMPUTE-SANITIZER", "Saved host", "Host Frame")):
            self.found.append(words)

    def line(self) -> str:
        return " / ".join(self.found)[:400] or " / ".join(self.end)[-400:]


def watch(
    command: Sequence[str], *, until: float, patience: float, on_report: Callable[[dict[str, Any]], None]
) -> tuple[str, str]:
    """Run a worker until time.monotonic() reaches `until`. A worker that says nothing for `patience` seconds is stuck.

    Returns ("ended" | "crashed" | "stuck" | "out of time", in one line what it said besides its reports).
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    said: queue.Queue = queue.Queue()
    threading.Thread(target=_lines, args=(process.stdout, said), daemon=True).start()
    noise = Noise()
    last = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now >= until or now - last >= patience:
                return ("out of time" if now >= until else "stuck"), noise.line()
            try:
                line = said.get(timeout=max(min(until, last + patience) - now, 0.01))
            except queue.Empty:
                continue
            if line is None:
                return ("crashed" if process.wait() else "ended"), noise.line()
            if line.startswith(MARK):
                last = time.monotonic()
                on_report(json.loads(line[len(MARK) :]))
            else:
                noise.hear(line)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started must not disturb the next stage
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def worker_command(stage: str, *arguments: str, before: Sequence[str] = ()) -> list[str]:
    return [*before, sys.executable, "-u", "-W", "ignore", "-m", "benchmarks.gpu.worker", stage, *arguments]


def run_stage(
    stage: str,
    arguments: Sequence[str],
    *,
    until: float,
    patience: float,
    on_report: Callable[[dict[str, Any]], None],
    before: Sequence[str] = (),
    start: Callable[..., tuple[str, str]] = watch,
) -> list[dict[str, Any]]:
    """A stage to its end. Where its process breaks inside a case, that case has failed and the rest gets a new process.
    Where it said who was at work then, the case begins anew without it: a rival is excused, only ours is a failure.

    Returns what could not be measured, each with its reason: {"id", "status": "failed" | "skipped", "why"}.
    """
    state = _State()
    lost: list[dict[str, Any]] = []

    def lose(name: str, status: str, why: str) -> None:
        lost.append({"stage": stage, "id": name, "status": status, "why": why})

    while True:
        state.now, state.busy = None, None
        skipped = [f"--skip={name}" for name in state.done]
        without = [f"--without={json.dumps(state.without)}"] if state.without else []
        command = worker_command(stage, *arguments, *skipped, *without, before=before)
        how, noise = start(command, until=until, patience=patience, on_report=lambda said: state.hear(said, on_report))
        if how == "ended":
            return lost
        if how == "out of time":
            for name in [name for name in state.planned if name not in state.done] or [state.now or stage]:
                lose(name, "skipped", "no time was left")
            return lost
        why = f"its process {'crashed' if how == 'crashed' else f'said nothing for {patience:.0f} s'}: {noise}"
        if state.now is None:  # it broke before its first case, or between two: once more would not help
            lose(stage, "failed", why)
            return lost
        if state.busy is None or state.busy[0] in state.without.get(state.now, {}):
            lose(state.now, "failed", why)
            state.done.append(state.now)
            continue
        who, ours = state.busy
        state.without.setdefault(ALWAYS if how == "stuck" and not ours else state.now, {})[who] = why
        if ours:
            lose(f"{state.now}, {who}", "failed", why)


@dataclass
class _State:
    """What a stage's processes said."""

    planned: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    now: str | None = None
    busy: tuple[str, bool] | None = None  # who is at work, and whether it is ours
    without: dict[str, dict[str, str]] = field(default_factory=dict)  # case -> who need not run again -> why

    def hear(self, said: dict[str, Any], on_report: Callable[[dict[str, Any]], None]) -> None:
        if "plan" in said:
            self.planned = said["plan"]
        elif "begin" in said:
            self.now, self.busy = said["begin"], None
        elif "busy" in said:
            self.busy = said["busy"], said["ours"]
        elif "end" in said:
            self.done.append(said["end"])
            self.without.pop(said["end"], None)
            self.now, self.busy = None, None
        else:
            if self.now and "backend" in said:
                self.without.setdefault(self.now, {})[said["backend"]] = ""
            on_report(said)
