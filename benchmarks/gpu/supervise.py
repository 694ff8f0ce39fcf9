"""A stage as a process of its own. What it reports is kept even when it crashes, hangs or runs out of time: a wrong
kernel can take the whole CUDA context with it, and must not take the run."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "@vkernels "  # what begins a line of report; everything else is noise of the libraries below


def emit(report: dict[str, Any]) -> None:
    """Called in a worker: one line, seen at once."""
    print(MARK + json.dumps(report), flush=True)


def _lines(stream: Any, into: queue.Queue) -> None:
    for line in stream:
        into.put(line)
    into.put(None)


def watch(
    command: Sequence[str], *, until: float, patience: float, on_report: Callable[[dict[str, Any]], None]
) -> tuple[str, str]:
    """Run a worker until time.monotonic() reaches `until`. A worker that says nothing for `patience` seconds is stuck.

    Returns ("ended" | "crashed" | "stuck" | "out of time", the end of what it said besides its reports).
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    said: queue.Queue = queue.Queue()
    threading.Thread(target=_lines, args=(process.stdout, said), daemon=True).start()
    noise: list[str] = []
    last = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now >= until or now - last >= patience:
                return ("out of time" if now >= until else "stuck"), "".join(noise[-12:])
            try:
                line = said.get(timeout=max(min(until, last + patience) - now, 0.01))
            except queue.Empty:
                continue
            if line is None:
                return ("crashed" if process.wait() else "ended"), "".join(noise[-12:])
            if line.startswith(MARK):
                last = time.monotonic()
                on_report(json.loads(line[len(MARK) :]))
            else:
                noise.append(line)
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

    Returns what could not be measured, each with its reason: {"id", "status": "failed" | "skipped", "why"}.
    """
    done: list[str] = []
    lost: list[dict[str, Any]] = []
    planned: list[str] = []
    while True:
        now: list[str | None] = [None]

        def listen(report: dict[str, Any], now: list[str | None] = now) -> None:
            if "plan" in report:
                planned[:] = report["plan"]
            elif "begin" in report:
                now[0] = report["begin"]
            elif "end" in report:
                done.append(report["end"])
                now[0] = None
            else:
                on_report(report)

        command = worker_command(stage, *arguments, *(f"--skip={x}" for x in done), before=before)
        how, noise = start(command, until=until, patience=patience, on_report=listen)
        if how == "ended":
            return lost
        if how == "out of time":
            left = [name for name in planned if name not in done] or [now[0] or stage]
            lost += [{"stage": stage, "id": name, "status": "skipped", "why": "no time was left"} for name in left]
            return lost
        why = f"its process {'crashed' if how == 'crashed' else f'said nothing for {patience:.0f} s'}: "
        why += " / ".join(noise.strip().splitlines()[-3:])[-400:]
        lost.append({"stage": stage, "id": now[0] or stage, "status": "failed", "why": why})
        if now[0] is None:  # it broke before its first case, or between two: once more would not help
            return lost
        done.append(now[0])
