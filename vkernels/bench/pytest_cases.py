"""Every case beside every rival as a pytest-benchmark test: `python -m vkernels bench` runs this module in its own
process, and plain pytest runs the quick selection:

    pytest --benchmark-json=out.json --pyargs vkernels.bench.pytest_cases

A round is a sample of the rival (the setup), then one of ours, so pairs alternate; pytest-benchmark's statistics are
ours, in seconds per call.
"""

from __future__ import annotations

import pytest

from vkernels.bench.measure import METER
from vkernels.bench.runner import Session, session_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    metafunc.parametrize("session", [session], ids=[""])
    metafunc.parametrize("lane", session.lanes, ids=session.ids())


@pytest.mark.benchmark(timer=METER.read)
def test_case(session: Session, lane, benchmark) -> None:
    benchmark.group = lane.entry.id
    row = session.run(lane, benchmark.pedantic)
    if row is None or row.rival_ms is None:
        pytest.skip(row.why or "" if row else "this rival does not speak of such a call")
    benchmark.extra_info.update(rival=row.rival, ratio=row.ratio, ratio_p20=row.ratio_p20, ratio_p80=row.ratio_p80)
