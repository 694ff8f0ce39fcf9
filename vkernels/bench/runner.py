"""A run: the lanes measured one after the other by pytest-benchmark, in this process, and collected as a Run."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vkernels.bench.case import Built, Entry
from vkernels.bench.measure import Lane, Pedantic, Settings, rounds_of
from vkernels.bench.results import Row

PLUGIN = "vkernels-bench"


def missing() -> str | None:
    """A sentence where pytest-benchmark is not there."""
    absent = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    return f"bench: needs {' and '.join(absent)}: pip install vkernels[bench]" if absent else None


@dataclass
class Session:
    """What is measured, how, and what was found so far."""

    lanes: list[Lane]
    settings: Settings
    tell: Callable[[Row], None] = lambda row: None
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _said: set[tuple[str, str, str | None]] = field(default_factory=set)
    _built: tuple[Entry, Built | str] | None = None  # the last entry's, or why it failed

    def ids(self) -> list[str]:
        return [f"{x.entry.op}-{x.entry.id}-{x.entry.dtype}-{x.entry.direction}-{x.rival.name}" for x in self.lanes]

    def _build(self, entry: Entry) -> Built:
        if self._built is None or self._built[0] is not entry:
            self._built = None  # the one before is freed first
            gc.collect()
            try:
                self._built = (entry, entry.build())
            except Exception as error:
                self._built = (entry, f"{entry.id}, {entry.dtype}, {entry.direction}: {error}")
                self.failures.append(self._built[1])
        built = self._built[1]
        assert not isinstance(built, str), built
        return built

    def run(self, lane: Lane, pedantic: Pedantic = rounds_of) -> Row | None:
        """One lane. Raises AssertionError where our result is wrong: a wrong kernel has no speed."""
        if time.monotonic() > self.settings.until:
            self.left_out.append(f"{lane.entry.op}, {lane.entry.id}, against {lane.rival.name}: no time was left")
            return None
        built = self._build(lane.entry)
        try:
            row = lane.measure(built, self.settings, pedantic)
        except Exception as error:
            self.failures.append(f"{lane.entry.id}, {lane.entry.dtype}, against {lane.rival.name}: {error}")
            raise
        if row is None or (row.op, row.rival, row.why) in self._said:
            return None
        if row.why:
            self._said.add((row.op, row.rival, row.why))  # the same reason once an op
        self.rows.append(row)
        self.tell(row)
        return row


def session_of(config: Any) -> Session:
    """The one this process was started for; under plain pytest, the quick selection."""
    found = config.pluginmanager.get_plugin(PLUGIN)
    if isinstance(found, Session):
        return found
    from vkernels.bench.select import quick_session

    return quick_session()


# No plugin and no option of somebody's project, and not one of somebody's xdist workers, where nothing would be timed.
OURS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""}


@contextmanager
def _only_our_plugins() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in OURS}
    os.environ.update(OURS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run(session: Session, options: Sequence[str] = ()) -> int:
    """Measure every lane; 0, or 1 where a result was wrong. `options` are pytest-benchmark's own, to store its JSON."""
    import pytest

    module = Path(__file__).with_name("pytest_cases.py")
    own = ["-c", os.devnull, f"--rootdir={module.parent}", "--noconftest", "-s", "-p", "no:terminal"]
    own += ["-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", "--benchmark-disable-gc"]
    with _only_our_plugins():
        status = pytest.main([*own, *options, str(module)], plugins=[_Named(session)])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if session.failures or status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return 1 if session.failures else 0
    session.failures.append(f"pytest ended with {status!r}")
    return 1


class _Named:
    """Makes the session known to the module under its name."""

    def __init__(self, session: Session):
        self.session = session

    def pytest_configure(self, config: Any) -> None:
        config.pluginmanager.register(self.session, PLUGIN)
