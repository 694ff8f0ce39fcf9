"""`make bench-gate`: it fails when a kernel loses its lead, says how, and does not fail for noise.

Trusted after mutation: a row judged by its first measurement alone, one that never fails, a band that may fall unasked,
one below 1, and rows without a band passed over each turned a test red.
With VKERNELS_CPU_ISA=baseline attention and divided attention turned red on a processor with AVX-512.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import vkernels as vk
from vkernels.bench import gate
from vkernels.bench.gate import SET, Band, Ratio, held, judge, main, measure, run, update
from vkernels.bench.rivals import rivals_of
from vkernels.library import native_missing
from vkernels.ops.rearrange import api as rearrange_api
from vkernels.spec import OPS

pytestmark = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
ROW = next(contest for contest in SET if contest.op == "rearrange")
BAND = Band(least=2.0, lowest=3.0, median=3.2, rival=ROW.rival)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def says(*leads: float):
    """A measurement that gives these ratios, one after the other."""
    left = list(leads)
    return lambda contest: Ratio(lead := left.pop(0), 0.9 * lead, 1.1 * lead)


def test_a_row_in_its_band_is_measured_once():
    good, said = judge(ROW, BAND, says(2.0))
    assert good
    assert said == f"{ROW.name}: 2.00x (pairs 1.80 to 2.20) of {ROW.rival}, the band begins at 2.00x"


def test_noise_is_measured_again_and_a_loss_three_times():
    good, said = judge(ROW, BAND, says(1.5, 1.9, 2.1))
    assert good
    assert said.endswith("measured 3 times")
    good, said = judge(ROW, BAND, says(1.5, 1.9, 1.2))
    assert not good
    assert said == (
        f"{ROW.name}: 1.90x (pairs 1.71 to 2.09) of {ROW.rival}, the band begins at 2.00x, it was 3.20x; "
        "measured 3 times. Where that is meant: python -m vkernels bench gate --update --accept"
    )


def test_a_band_is_half_of_the_lead_and_never_below_one():
    band = held([Ratio(3.4, 3.0, 3.5), Ratio(3.2, 3.1, 3.3), Ratio(2.8, 2.7, 3.1)], "x")
    assert band == Band(least=1.9, lowest=2.8, median=3.2, rival="x")
    assert held([Ratio(0.8, 0.7, 0.9)], "x").least == 1.0


def small(maker):
    keep = vk.rearrangement.keep(indices=torch.arange(0, 512, 2), n=512)
    weights = {"norm_weight": maker.randn(256), "norm_bias": maker.randn(256)}
    return {"x": maker.randn(1, 512, 256), "plan": keep, "norm": "layer", **weights}


SMALL = replace(ROW, id="small", make=small, rival="permute or index_select, norm")


def test_a_slowed_kernel_turns_the_gate_red(monkeypatch, capsys):
    """The same call, the same band: red as soon as our kernel does its work forty times more."""
    monkeypatch.setattr(gate, "PAIRS", 20)
    quick = lambda contest: measure(contest, 0.0)  # noqa: E731
    before = quick(SMALL)
    band = {SMALL.name: Band(before.lead / 4, before.lead, before.lead, SMALL.rival)}
    assert run([SMALL], band, quick) == 0
    plain = rearrange_api.BACKENDS[0]

    def slow(call):
        for _ in range(40):
            plain.run(call)
        return plain.run(call)

    monkeypatch.setattr(rearrange_api, "BACKENDS", (replace(plain, run=slow), *rearrange_api.BACKENDS[1:]))
    vk.remember.forget()
    assert run([SMALL], band, quick) == 1
    vk.remember.forget()
    out = capsys.readouterr().out
    assert "ok     rearrange: small [float32]" in out
    assert "FAILED rearrange: small [float32]" in out
    assert "1 rows in" in out


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    plain = rearrange_api.BACKENDS[0]
    wrong = replace(plain, run=lambda call: (plain.run(call)[0] + 1, None))
    monkeypatch.setattr(rearrange_api, "BACKENDS", (wrong, *rearrange_api.BACKENDS[1:]))
    vk.remember.forget()
    assert run([SMALL], {SMALL.name: BAND}, lambda contest: measure(contest, 0.02)) == 1
    vk.remember.forget()
    assert "differs from permute or index_select, norm by" in capsys.readouterr().out


def test_a_row_without_a_band_fails():
    assert run([ROW], {}, says()) == 1


def test_update_raises_bands_and_lowers_them_only_when_asked(tmp_path, capsys):
    path = tmp_path / "gate.json"
    assert update(path, [ROW], False, says(3.0, 3.0, 3.0)) == []
    least = lambda: json.loads(path.read_text())["bands"][gate.isa()]["rows"][ROW.name]["least"]  # noqa: E731
    assert least() == pytest.approx(2.0)
    assert update(path, [ROW], False, says(5.0, 5.0, 5.0)) == []
    assert least() == pytest.approx(3.0)
    assert "would fall from 3.00x to 2.00x" in update(path, [ROW], False, says(3.0, 3.0, 3.0))[0]
    assert least() == pytest.approx(3.0)
    assert update(path, [ROW], True, says(3.0, 3.0, 3.0)) == []
    assert least() == pytest.approx(2.0)


def test_without_bands_for_this_processor_nothing_is_judged(tmp_path, capsys):
    assert main([f"--bands={tmp_path / 'none.json'}"]) == 0
    assert f"has no bands for {gate.isa()}, so nothing is judged" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text('{"bands": {"avx2": {"rows": {"x": {"least": 1}}}}}')
    assert main([f"--bands={tmp_path / 'bad.json'}"]) == 2
    assert "must hold bands as python -m vkernels bench gate --update writes them" in capsys.readouterr().err


def test_no_row_is_no_pass(capsys):
    assert main(["--match=nosuch"]) == 2
    assert "bench gate: --match must be in the name of a row, got 'nosuch'" in capsys.readouterr().err


def test_the_committed_bands_are_of_the_set():
    stored = gate.read(gate.BANDS)
    for bands in stored["bands"].values():
        assert set(bands["rows"]) == {contest.name for contest in SET}
        assert {"commit", "machine", "threads", "torch"} < set(bands)
        for contest in SET:
            band = Band(**bands["rows"][contest.name])
            assert band.rival == contest.rival
            assert band.least >= 1.0


def test_every_op_is_held_and_every_rival_is_there():
    assert {contest.op for contest in SET} == set(OPS)
    for contest in SET:
        rival = contest.opponent()
        assert rival in rivals_of(contest.op)
        assert not rival.gpu
        assert not rival.compiles
