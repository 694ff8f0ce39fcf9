"""A measured table decides between backends that could both run a call; here it is made up."""

from __future__ import annotations

import json

import pytest
import torch

import vkernels as vk
from benchmarks.gpu.preferences import preferences, update
from vkernels import dispatch
from vkernels.dispatch import Backend, choose, like
from vkernels.spec import Maker, all_specs

CPU = torch.device("cpu")


def backend(name, why_not=None, kind=None):
    return Backend(name, lambda call: why_not, lambda call: name, kind)


BACKENDS = (
    backend("cpu", "the tensors are on a GPU"),
    backend("cuda", kind=lambda call: (CPU, call)),
    backend("triton"),
    backend("reference"),
)


@pytest.fixture
def table(monkeypatch):
    measured = {"cpu": {"op": {"wide": {"cuda": 1.4, "triton": 1.0}, "narrow": {"cuda": 1.0, "triton": 3.0}}}}
    monkeypatch.setattr(dispatch, "measured", measured)
    return measured


def test_the_table_that_is_shipped_is_empty_or_about_gpus():
    for chip, ops in json.loads(dispatch.PREFERENCES.read_text()).items():
        assert chip.startswith("sm")
        for kinds in ops.values():
            assert all(min(times.values()) == 1.0 for times in kinds.values())


def test_without_a_table_the_listed_order_decides(monkeypatch):
    monkeypatch.setattr(dispatch, "measured", {})
    assert choose("op", BACKENDS, None, "wide").name == "cuda"


def test_the_faster_goes_first_where_it_was_measured(table):
    assert choose("op", BACKENDS, None, "wide").name == "triton"
    assert choose("op", BACKENDS, None, "narrow").name == "cuda"
    assert choose("op", BACKENDS, None, "never measured").name == "cuda"
    assert choose("another op", BACKENDS, None, "wide").name == "cuda"
    table["sm90"] = table.pop("cpu")
    assert choose("op", BACKENDS, None, "wide").name == "cuda"


def test_a_backend_by_name_and_one_that_refuses(table):
    assert choose("op", BACKENDS, "cuda", "wide").name == "cuda"
    refusing = (*BACKENDS[:2], backend("triton", "not here"), BACKENDS[3])
    assert choose("op", refusing, None, "wide").name == "cuda"


def test_only_places_of_measured_backends_change(table):
    table["cpu"]["op"]["wide"] = {"reference": 1.0, "cuda": 2.0}
    assert [b.name for b in dispatch.ranked("op", BACKENDS, "wide")] == ["cpu", "reference", "triton", "cuda"]


def test_kinds_are_classes_not_sizes():
    assert like(torch.empty(7, 72, dtype=torch.bfloat16)) == (CPU, "bfloat16, d <= 128")
    assert like(torch.empty(9, 128, dtype=torch.bfloat16)) == (CPU, "bfloat16, d <= 128")
    assert like(torch.empty(9, 64)) == (CPU, "float32, d <= 64")
    assert like(torch.empty(9, 300)) == (CPU, "float32, d <= any")


# What tells the calls of an op apart beside dtype and head size.
CLASSES = {
    "apply_rope": ["d <= 64", "d <= 128"],
    "attention": ["all keys", "short groups", "intervals", "windows"],
    "decode_attention": ["bf16, queries <= 8", "int8, queries <= 8", "int2, queries <= 8"],
    "divided_attention": ["spatial, groups <= 128", "temporal, groups <= 16", "temporal, groups <= 128"],
    "kv_append": ["bf16", "int8", "int4", "int2"],
    "qkv_prologue": ["d <= 64", "d <= 128"],
    "rearrange": ["4 bytes, a move", "sum", "max", "sum, a norm"],
}


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.name)
def test_a_table_by_hand_orders_the_gpu_backends_of_every_op(spec, monkeypatch):
    found = set()
    for case in spec.cases:
        call = spec.prepare(**case.make(Maker()))
        kind = next(b.kind for b in spec.backends if b.kind is not None)(call)
        assert kind[0] == CPU
        found.add(kind[1])
        monkeypatch.setattr(dispatch, "measured", {"cpu": {spec.name: {kind[1]: {"cuda": 1.7, "triton": 1.0}}}})
        order = [b.name for b in dispatch.ranked(spec.name, spec.backends, call)]
        assert order == ["cpu", "triton", "cuda", "reference"]
    for words in CLASSES[spec.name]:
        assert any(kind.endswith(words) for kind in found), (words, found)


def decode_call():
    cache = vk.KVCache("int4", b=1, m=2, d=64, capacity=128, dtype=torch.float16)
    k = torch.zeros(1, 5, 2, 64, dtype=torch.float16)
    return torch.zeros(1, 1, 28, 64, dtype=torch.float16), cache.append(k, k)


def test_explain_names_what_was_measured(monkeypatch):
    monkeypatch.setattr(dispatch, "measured", {})
    q, cache = decode_call()
    plain = vk.explain("decode_attention", q, cache)
    assert plain.backend != "reference"
    assert "measured on" not in str(plain)
    times = {"reference": 1.0, plain.backend: 1.257}
    made_up = {"cpu": {"decode_attention": {"float16, d <= 64, int4, queries <= 16": times}}}
    monkeypatch.setattr(dispatch, "measured", made_up)
    told = vk.explain("decode_attention", q, cache)
    assert told.backend == "reference"
    said = f"measured on cpu, float16, d <= 64, int4, queries <= 16: reference 1.00x, {plain.backend} 1.26x"
    assert f"{said} of the fastest's time" in str(told)


def test_a_compiled_call_follows_the_table(monkeypatch):
    q, cache = decode_call()
    times = {"reference": 1.0, "cpu": 2.0}
    made_up = {"cpu": {"decode_attention": {"float16, d <= 64, int4, queries <= 16": times}}}
    monkeypatch.setattr(dispatch, "measured", made_up)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    torch.compile(lambda q: vk.decode_attention(q, cache), fullgraph=True, backend=keep)(q)
    assert "decode_attention" not in graphs[0]  # the reference is plain PyTorch


def raced(id, backend, ms, op="op", kind="wide", direction="forward", status="measured"):
    row = {"op": op, "kind": kind, "id": id, "dtype": "bfloat16", "direction": direction, "backend": backend}
    return {**row, "ms": ms, "status": status}


def test_a_run_becomes_a_table(tmp_path):
    rows = [
        raced("a", "cuda", 2.0),
        raced("a", "triton", 1.0),
        raced("b", "cuda", 8.0),
        raced("b", "triton", 1.0),
        raced("c", "cuda", 0.001),  # Triton refused: says nothing about the two
        raced("c", "triton", 9.0, status="skipped"),
        raced("a", "cuda", 1.0, kind="narrow"),  # nobody to compare with
        raced("a", "cuda", 1.0, kind=None),
    ]
    assert preferences(rows) == {"op": {"wide": {"cuda": 4.0, "triton": 1.0}}}  # the square root of 2 times 8
    file = tmp_path / "preferences.json"
    file.write_text(json.dumps({"sm80": {"op": {"wide": {"cuda": 1.0, "triton": 2.0}}}}))
    assert update("sm90", rows, file) == 1
    rows = [raced("a", "cuda", 1.0, kind="narrow"), raced("a", "triton", 1.5, kind="narrow")]
    assert update("sm90", rows, file) == 1
    wide, narrow = {"cuda": 4.0, "triton": 1.0}, {"cuda": 1.0, "triton": 1.5}
    stored = json.loads(file.read_text())
    assert stored == {
        "sm80": {"op": {"wide": {"cuda": 1.0, "triton": 2.0}}},
        "sm90": {"op": {"wide": wide, "narrow": narrow}},
    }
