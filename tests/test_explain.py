"""`vk.explain` and `python -m vkernels explain`: who would run a call, what it is cut to, what it costs at the least.

Trusted after mutation: the CPU's backend left among a GPU's, launches that run, tiles of another chip, a cache that
`explain` fills, the roofline's two sides swapped, and a flag an op has no use for taken in silence turned a test red.
"""

from __future__ import annotations

import time

import pytest
import torch

import vkernels as vk
from vkernels import library
from vkernels.__main__ import main as command
from vkernels.explain_cli import CALLS, CHIPS, main
from vkernels.library import native, native_missing
from vkernels.roofline import STATED
from vkernels.spec import OPS, Maker, all_specs
from vkernels.triton.tiles import tiles

needs_native = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
needs_cuda = pytest.mark.skipif(library.cuda_unbuilt() is not None, reason=str(library.cuda_unbuilt()))


@pytest.fixture
def told(capsys):
    def run(line: str) -> str:
        status = main(line.split())
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("chip", ["sm80", "sm90"])
def test_every_case_is_explained_for_a_gpu_that_is_not_here(spec, chip):
    for case in spec.cases:
        said = vk.explain(spec.fn, **case.make(Maker(torch.float16)), machine="a100", chip=chip)
        assert said.reasons["cpu"] == "the tensors are on cuda, this backend runs on the CPU"
        assert said.backend == next(name for name, reason in said.reasons.items() if reason is None)
        assert "cpu" not in said.tiles
        empty = case.id in ("empty", "no_queries")
        assert empty or all(said.tiles[name] for name in said.tiles)


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.name)
def test_what_is_explained_stays_as_it_was(spec):
    kwargs = spec.cases[0].make(Maker(torch.float16))
    held = [x for x in kwargs.values() if isinstance(x, torch.Tensor)]
    if cache := kwargs.get("cache"):
        held += [x for x in (*cache.tensors(), cache.lengths, cache.table) if x is not None]
    before = [x.clone() for x in held]
    vk.explain(spec.fn, **kwargs, machine="h200", chip="sm90")
    vk.explain(spec.fn, **kwargs, machine="h200")
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))
    assert not library._noting
    assert library.recording_for is None


def test_tiles_are_the_rows_kernels_are_launched_with(told):
    out = told("attention --q 1,8192,16,64 --mask frame_causal:32,16,16 --on h200 --backend triton")
    row = tiles("attention", "_attention_fwd_kernel", "sm90", d=64, bytes=2)
    said = ", ".join(f"{name} {value}" for name, value in row.items())
    assert f"tiles of triton: _attention_fwd_kernel: {said}; {16 * 8192 // row['BLOCK_M']:,} programs" in out
    for machine, chip in (("a100", "sm80"), ("h200", "sm90")):
        row = tiles("attention", "_attention_fwd_kernel", chip, d=128, bytes=2)
        assert f"BLOCK_N {row['BLOCK_N']}," in told(f"attention --q 1,512,4,128 --on {machine}")


@needs_cuda
def test_cuda_kernels_say_what_they_would_be_launched_with(told):
    out = told("attention --q 1,8192,16,64 --on h100")
    assert "attention: backend cuda" in out
    assert "tiles of cuda: attention, attend: 1,024 x 1 blocks of 128 threads" in out  # 128 queries of one head each


@needs_native
def test_cpu_tiles_are_those_of_the_instruction_set():
    sizes = {}
    before = native().isa_active()
    try:
        for isa in native().isa_usable():
            native().isa_force(isa)
            sizes[isa] = native().tile_sizes("attention")
            q = torch.zeros(1, 4, 2, 8)
            assert f"tiles of cpu: {isa}: queries of a strip {sizes[isa]['queries of a strip']}" in str(
                vk.explain("attention", q, q, q, machine="h200")
            )
    finally:
        native().isa_force(before)
    assert sizes["baseline"]["queries of a strip"] == 4
    assert sizes["baseline"]["keys of a panel"] == 8
    assert all(native().tile_sizes(op) for op in OPS)


def test_several_machines_are_a_table_of_right_numbers(told):
    """4 s^2 n d = 68.7 GFLOP and 4 tensors of 8.4 MB; on an H200 790 TFLOP/s are 87 us, 4.3 TB/s 7.8 us."""
    out = told("attention --q 1,4096,8,128 --dtype fp16 --on h200 a100 rtx4090 cpu")
    assert "68.7 GFLOP, 33.6 MB, 2.05e+03 FLOP/B" in out
    rows = [line.split() for line in out.splitlines()[-5:]]
    assert rows[0] == ["machine", "at", "best", "bound", "by", "ceilings"]
    assert [" ".join(row[-4:]) for row in rows[1:4]] == [
        "87 us arithmetic stated",
        "255 us arithmetic stated",
        "429 us arithmetic stated",
    ]
    assert rows[4][-1] == "measured"
    out = told("apply_rope --q 1,8192,32,128 --on a100")  # 2 tensors of 67 MB at 1.7 TB/s
    assert "79 us    bytes     stated" in out


def test_sizes_cost_nothing(told):
    start = time.perf_counter()
    out = told("attention --q 1,131072,32,128 --k 1,131072,8,128 --mask frame_causal:512,16,16 --on h200")
    assert "8,606,711,808 of 17,179,869,184 pairs visible (50.1%)" in out
    assert time.perf_counter() - start < 20  # the dense mask would be 17 GB


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("attention --q 1,512,4,64", "attention: backend cpu"),
        ("attention --q 1,64,4,64 --mask temporal:4,4,4+keep:0.5", "of 4,096 pairs visible"),
        ("attention --q 1,96,4,64 --mask cu_seqlens:0,32,96", "5,120 of 9,216 pairs visible"),
        ("divided_attention --q 1,257,4,64 --grid 1,16,16 --axis spatial", "divided_attention: backend cpu"),
        ("apply_rope --q 1,64,4,64 --k 1,64,1,64 --dtype fp32", "apply_rope: backend cpu"),
        ("qkv_prologue --q 1,64,4,64 --k 1,64,1,64", "qkv_prologue: backend cpu"),
        ("kv_append --k 1,512,4,64 --cache int4", "kv_append: backend cpu"),
        ("decode_attention --q 1,1,8,64 --k 1,512,4,64 --cache int2", "decode_attention: backend cpu"),
        ("rearrange --x 1,2916,64 --plan pool:4,27,27", "rearrange: backend cpu"),
        ("rearrange --x 2,12,64 --plan newline:2,2,3", "rearrange: backend cpu"),
        ("attention --case siglip --on h200 --device cpu", "attention: backend cpu"),
        ("attention --case siglip --device cuda", "attention: backend cuda"),
        ("attention --case grouped --backend reference", "attention: backend reference"),
        ("kv_append --list", "LLaMA-7B, 512 tokens after 512"),
    ],
)
@needs_native
@needs_cuda
def test_calls_are_said_in_sizes(told, line, says):
    assert says in told(line)


def test_an_einops_pattern_is_a_plan(capsys):
    assert main(["rearrange", "--x", "4,8,2,64", "--plan", "einops:t l n c -> l t n c"]) == 0
    assert "rearrange: backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("softmax --q 1,2,3,4", "explain: op must be one of apply_rope, attention"),
        ("attention", "explain: attention must be given --q b,s,n,d, or --case ID"),
        ("attention --q 1,2,3", "explain: --q must be b,s,n,d, such as --q 1,8192,16,64, got 1,2,3"),
        ("attention --q 1,2,x,4", "explain: --q must be b,s,n,d, such as --q 1,8192,16,64, got 1,2,x,4"),
        ("attention --q 1,64,4,64 --mask diagonal", "explain: --mask must be one of joint, spatial"),
        ("attention --q 1,64,4,64 --mask causal:63", "attention: mask must speak of 64 x 64 tokens, got 63 x 63"),
        ("attention --q 1,64,4,64 --mask window:4,4,4", "explain: --mask window: must be t,h,w,dt,dh,dw"),
        ("attention --q 1,64,4,64 --mask causal:64+keep:all", "explain: --mask +keep must be a share such as 0.5"),
        ("attention --q 1,64,4,64 --grid 4,4,4", "explain: attention must be asked without --grid"),
        ("attention --case nosuch", "explain: --case must be one of grouped, long"),
        ("attention --case siglip --q 1,2,3,4", "explain: --case must come without sizes, got --q"),
        ("attention --q 1,64,4,64 --backend abacus", "attention: backend must be one of cpu, cuda, triton, reference"),
        ("attention --q 1,64,4,64 --on h200 --backend cpu", "attention: backend must be one of cuda"),
        ("rearrange --x 1,4,8 --plan sort", "explain: --plan must be one of einops"),
        ("rearrange --x 1,4,8 --plan pool:1,2", "explain: --plan pool must have the numbers of vkernels.rearrangement"),
        ("kv_append --k 1,2,4,64 --cache int3", "explain: --cache must be one of bf16, fp16, fp32, int8, int4, int2"),
        ("attention --q 4096,1048576,1024,256", "explain: the tensors must fit the memory"),
    ],
)
def test_what_is_no_call_gets_a_sentence(capsys, line, sentence):
    assert main(line.split()) == 2
    assert sentence in capsys.readouterr().err


def test_a_chip_is_a_chip():
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="explain: chip must be sm80, sm89, sm90 or another from sm80 on, got 'sm70'"):
        vk.explain("attention", q, q, q, machine="h200", chip="sm70")


def test_every_op_and_every_machine_can_be_asked_for(capsys):
    assert set(CALLS) == set(OPS)
    assert set(CHIPS) == set(STATED)
    assert command(["explain", "attention", "--list"]) == 0
    assert "SigLIP, 16 frames" in capsys.readouterr().out
