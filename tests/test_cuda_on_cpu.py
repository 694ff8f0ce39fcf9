"""The emulator CUDA kernels are proven with: every twin against the PTX ISA's layouts, every fault it must catch.

Expected places are written out from the PTX ISA (mma.m16n8k16, ldmatrix), not computed with the functions under test.
Planted in the twins and seen red here: rows 8 apart swapped in A, columns 8 apart swapped in A, B read as its
transpose, C's second row at +4, ldmatrix or movmatrix without its transpose, matrices 1 and 2 exchanged, shuffle_down
by one too many, a copy that lands when it is started, a barrier that opens one thread early.
"""

from __future__ import annotations

import math
import os
import struct
import time

import pytest
import torch

from vkernels import library
from vkernels.library import ref

if library.emulator is None:
    pytest.skip("the CUDA kernels are not emulated here (needs g++, ninja and pybind11)", allow_module_level=True)

E = library.emulator.module

# Lane 0, 1, 5 and 31: (row, column) of each element of their fragments, as the figures of the PTX ISA draw them.
A = {
    0: [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)],
    1: [(0, 2), (0, 3), (8, 2), (8, 3), (0, 10), (0, 11), (8, 10), (8, 11)],
    5: [(1, 2), (1, 3), (9, 2), (9, 3), (1, 10), (1, 11), (9, 10), (9, 11)],
    31: [(7, 6), (7, 7), (15, 6), (15, 7), (7, 14), (7, 15), (15, 14), (15, 15)],
}
B = {
    0: [(0, 0), (1, 0), (8, 0), (9, 0)],
    1: [(2, 0), (3, 0), (10, 0), (11, 0)],
    5: [(2, 1), (3, 1), (10, 1), (11, 1)],
    31: [(6, 7), (7, 7), (14, 7), (15, 7)],
}
C = {
    0: [(0, 0), (0, 1), (8, 0), (8, 1)],
    1: [(0, 2), (0, 3), (8, 2), (8, 3)],
    5: [(1, 2), (1, 3), (9, 2), (9, 3)],
    31: [(7, 6), (7, 7), (15, 6), (15, 7)],
}


@pytest.mark.parametrize(("which", "places"), [("a", A), ("b", B), ("c", C)])
def test_fragments_lie_where_ptx_draws_them(which, places):
    for lane, elements in places.items():
        assert [E.fragment_places(which, lane, i) for i in range(len(elements))] == elements


@pytest.mark.parametrize(("which", "shape", "count"), [("a", (16, 16), 8), ("b", (16, 8), 4), ("c", (16, 8), 4)])
def test_fragments_cover_their_tile_once(which, shape, count):
    places = [E.fragment_places(which, lane, i) for lane in range(32) for i in range(count)]
    assert sorted(places) == [(row, column) for row in range(shape[0]) for column in range(shape[1])]


def word(low: int, high: int) -> int:
    return low | high << 16


def bits16(x: float, brain: bool) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0] >> 16 if brain else struct.unpack("<H", struct.pack("<e", x))[0]


def registers(tile: torch.Tensor, which: str, count: int, brain: bool) -> list[list[int]]:
    """A tile as every lane holds it, by the formulas of the PTX ISA."""
    lanes = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        values = []
        for i in range(count):
            if which == "a":
                row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
                column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            else:
                row, column = thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
            values.append(bits16(float(tile[row, column]), brain))
        lanes.append([word(*values[i : i + 2]) for i in range(0, count, 2)])
    return lanes


@pytest.mark.parametrize("brain", [True, False], ids=["bf16", "f16"])
def test_product_of_two_tiles(brain):
    """Small integers: every product and sum is exact, so the result is the matrix product, bit for bit."""
    a, b = torch.randint(-8, 9, (16, 16)).float(), torch.randint(-8, 9, (16, 8)).float()
    c = torch.randint(-99, 99, (16, 8)).float()
    want = a @ b + c
    held = [[float(c[row, column]) for row, column in (_c(lane, i) for i in range(4))] for lane in range(32)]
    got = E.multiply_add(registers(a, "a", 8, brain), registers(b, "b", 4, brain), held, brain)
    for lane in range(32):
        for i in range(4):
            assert got[lane][i] == want[_c(lane, i)]


def _c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def test_one_element_by_hand():
    """A(9, 3) = 2, on lane 5 in the upper half of register 1; B(3, 6) = 5, on lane 25 in the upper half of register 0.
    Their product is C(9, 6): lane 7, element 2."""
    a = [[0] * 4 for _ in range(32)]
    b = [[0] * 2 for _ in range(32)]
    a[5][1] = word(0, 0x4000)  # bf16 2
    b[25][0] = word(0, 0x40A0)  # bf16 5
    got = E.multiply_add(a, b, [[0.0] * 4 for _ in range(32)], True)
    nonzero = {(lane, i): got[lane][i] for lane in range(32) for i in range(4) if got[lane][i]}
    assert nonzero == {(7, 2): 10.0}


@pytest.mark.parametrize("count", [4, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(count, transposed):
    """Element (row, column) of matrix i holds 100 i + 10 row + column; rows are 24 elements apart."""
    shared = [0] * (8 * count * 24)
    rows = []
    for lane in range(32):
        i, row = lane // 8, lane % 8
        rows.append((row * count + i) * 24 if i < count else 0)
        if i < count:
            for column in range(8):
                shared[rows[-1] + column] = 100 * i + 10 * row + column
    got = E.load_matrices(shared, rows, count, transposed)
    assert got[0] == [word(100 * i, 100 * i + (10 if transposed else 1)) for i in range(count)]
    # lane 14 = 4 * 3 + 2: row 3, columns 4 and 5
    first, second = (43, 53) if transposed else (34, 35)
    assert got[14] == [word(100 * i + first, 100 * i + second) for i in range(count)]
    first, second = (67, 77) if transposed else (76, 77)
    assert got[31] == [word(100 * i + first, 100 * i + second) for i in range(count)]


def test_rows_from_shared_memory_are_fragments():
    """The usual pairing: matrices (0, 0), (8, 0), (0, 8), (8, 8) of a row-major 16 x 16 tile are fragment A; those of a
    row-major 16 x 8 tile, transposed, are fragment B."""
    a, b = torch.randint(-8, 9, (16, 16)).float(), torch.randint(-8, 9, (16, 8)).float()
    flat = [bits16(float(x), True) for x in a.flatten()]
    rows = [(lane % 16) * 16 + (8 if lane >= 16 else 0) for lane in range(32)]
    assert E.load_matrices(flat, rows, 4, False) == registers(a, "a", 8, True)
    flat = [bits16(float(x), True) for x in b.flatten()]
    assert E.load_matrices(flat, [lane % 16 * 8 for lane in range(32)], 2, True) == registers(b, "b", 4, True)


def test_transpose_matrix():
    """Element (row, column) holds 10 row + column; lane 14 = 4 * 3 + 2 has row 3, columns 4 and 5, before and after."""
    words = [word(10 * (i // 4) + i % 4 * 2, 10 * (i // 4) + i % 4 * 2 + 1) for i in range(32)]
    got = E.transpose_matrix(words)
    assert got[0] == word(0, 10)
    assert got[14] == word(43, 53)
    assert got[31] == word(67, 77)
    assert E.transpose_matrix(got) == words


@pytest.mark.parametrize("by", [1, 2, 3, 7, 12, 16, 641, 65537, 2**30, 2**31 - 1])
def test_division_by_multiplication(by):
    last = 2**31 - 1
    for x in {0, 1, 6, 1000, by - 1, by, 2 * by - 1, last // by * by - 1, last // by * by, last - 1, last}:
        if 0 <= x <= last:
            assert E.divide(x, by) == divmod(x, by)


def test_attention_on_one_warp():
    """The instructions together: what an attention kernel does with a tile of 16 x 16, softmax to the base 2."""
    qkv, out = torch.randn(3, 16, 16).bfloat16(), torch.full((16, 16), math.nan)
    E.allow([ref(qkv), ref(out)])
    try:
        E.attend(ref(qkv), ref(out))
    finally:
        E.allow([])
    q, k, v = qkv.double()
    weights = torch.softmax(q @ k.T * math.log(2), -1)
    torch.testing.assert_close(out.double(), weights.bfloat16().double() @ v, rtol=0, atol=1e-2)
    assert (out.double() - weights @ v).abs().max() < 2e-2


def test_permute_bytes():
    low, high = 0x33221100, 0x77665544
    assert E.permute_bytes(low, high, 0x3210) == low
    assert E.permute_bytes(low, high, 0x7654) == high
    assert E.permute_bytes(low, high, 0x5410) == 0x55441100
    assert E.permute_bytes(low, high, 0x0725) == 0x00772255


def test_two_products_in_float16_are_rounded_once():
    x = torch.tensor([1.0009765625, -3.0, 60000.0, 6e-8]).half()  # 1.0009765625 = 1 + 2^-10
    bits = [int(i) & 0xFFFF for i in x.view(torch.int16)]
    # (1 + 2^-10)^2 - 1 = 2^-9 + 2^-20: a product rounded before the sum would be 2^-9
    got = E.multiply_add_two(word(bits[0], bits[1]), word(bits[0], bits[1]), word(0xBC00, 0x3C00))
    want = torch.tensor([2.0**-9 + 2.0**-20, 10.0]).half().view(torch.int16)
    assert got == word(int(want[0]), int(want[1]))
    assert E.multiply_add_two(word(bits[2], bits[3]), word(0x4000, 0x3C00), 0) == word(0x7C00, bits[3])


# Members of a unit of 32 that thread t holds as its pairs, worked out by hand from the layout of a word.
PAIRS = {
    8: {
        0: [(0, 4), (1, 5), (2, 6), (3, 7)],
        3: [(24, 28), (25, 29), (26, 30), (27, 31)],
    },  # bytes of words 2 t, 2 t + 1
    4: {0: [(0, 4), (1, 5), (2, 6), (3, 7)], 2: [(16, 20), (17, 21), (18, 22), (19, 23)]},  # nibbles of word t
    2: {1: [(4, 12), (5, 13), (6, 14), (7, 15)], 2: [(16, 24), (17, 25), (18, 26), (19, 27)]},  # half of word t / 2
}


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_come_out_in_the_pairs_of_fragments(bits):
    codes = torch.randint(0, 1 << bits, (32,))
    codes[:2] = torch.tensor([0, (1 << bits) - 1])
    per = 32 // bits
    words = [sum(int(codes[per * w + i]) << (bits * i) for i in range(per)) for w in range(bits)]
    mine = {8: lambda t: words[2 * t : 2 * t + 2], 4: lambda t: [words[t]], 2: lambda t: [words[t // 2]]}[bits]
    got = E.unpack(bits, [mine(t) for t in range(4)])
    pairs = torch.tensor(got, dtype=torch.int64).to(torch.int32).view(torch.float16).view(4, 4, 2).float()
    want = (codes - (1 << (bits - 1))) / 2
    for thread, members in PAIRS[bits].items():
        assert pairs[thread].tolist() == [[want[a], want[b]] for a, b in members]
    places = [E.order(bits, member) for member in range(32)]
    assert sorted(places) == list(range(32))
    assert torch.equal(pairs.flatten()[places], want)


def test_the_last_block_to_come_knows_it_and_leaves_the_counter_clean():
    assert E.tickets(1) == ([1], 0)
    assert E.tickets(4) == ([0, 0, 0, 1], 0)


def test_shuffles():
    x = list(range(100, 132))
    whole = 0xFFFFFFFF
    assert E.shuffle("to", x, 5, whole) == [105] * 32
    assert E.shuffle("xor", x, 1, whole) == [100 + lane + (1 if lane % 2 == 0 else -1) for lane in range(32)]
    assert E.shuffle("down", x, 8, whole) == [*range(108, 132), *range(124, 132)]
    votes = E.shuffle("ballot", [1, 0, 0, 1] + [0] * 28, 0, whole)
    assert votes == [0b1001] * 32
    half = E.shuffle("xor", x, 2, 0x0000FFFF)
    assert half == [102, 103, 100, 101, 106, 107, 104, 105, 110, 111, 108, 109, 114, 115, 112, 113, *x[16:]]


def test_sums_and_maxima_over_lanes():
    x = [float(i) for i in range(32)]
    assert E.over_lanes(x, True, 32) == [496.0] * 32
    assert E.over_lanes(x, False, 32) == [31.0] * 32
    assert E.over_lanes(x, True, 4) == [float(4 * (16 * (i // 4)) / 4 + 6) for i in range(32)]
    assert E.over_lanes(x, False, 4) == [float(i // 4 * 4 + 3) for i in range(32)]


def test_extremes_of_integers():
    assert E.extremes([7, -3, 2**31 - 1, *range(28), -(2**31)]) == [-(2**31), 2**31 - 1] * 16


@pytest.mark.parametrize(("brain", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_rounding_is_torchs(brain, dtype):
    x = torch.tensor([1 / 3, -1e-3, 65519.0, 1e-7, -0.0, math.inf, 2.0**-24, 1.00390625])
    got = E.rounded(x.tolist(), brain)
    want = x.to(dtype).float()
    assert got == [*want.tolist(), want[0].item()]


def test_fast_powers():
    assert E.exp2_fast(-math.inf) == 0.0
    assert E.exp2_fast(-3.0) == 0.125
    assert E.log2_fast(8.0) == 3.0


def fault(name: str, planted: bool, order: int = 3) -> torch.Tensor:
    """What kernel `name` makes of 0..63, in memory that is NaN on both sides."""
    memory = torch.full((64 + 2 * 16,), math.nan)
    source, target = memory[16:80], torch.full((64,), -1.0)
    source.copy_(torch.arange(64.0))
    E.set_order(order)
    E.allow([ref(source), ref(target)])
    try:
        E.faults[name](ref(source), ref(target), planted)
    finally:
        E.allow([])
        E.set_order(3)
    return target


REFUSED = {
    "outside_shared": "4 bytes at 256 are outside the 256 bytes of shared memory",
    "outside_shared_unseen": "the block wrote outside its shared memory",
    "outside_global": "thread 63: 4 bytes at 0x[0-9a-f]+ are outside the tensors of the call",
    "misaligned": "global address 0x[0-9a-f]+ is not aligned to 16 bytes",
    "divergent_barrier": r"threads of a block part: barrier 0 \(.*faults.cpp:\d+\) here, others at .*faults.cpp:\d+",
    "left_before_barrier": "thread 5 has left",
    "divergent_shuffle": "lanes of a warp part: shuffle",
    "mismatched_masks": "shuffle_xor .*: mask ffffffff here, 0000ffff on lane 7|mask 0000ffff here, ffffffff on lane",
    "lane_outside_its_mask": "shuffle_xor: the lane is not in its own mask 0000ffff",
    "divergent_matrix": "lanes of a warp part: multiply_add",
    "deadlock": r"threads wait for each other; 32 at barrier 2 .*; 32 at its end, the first is thread 32",
}
WRONG = [
    "missing_barrier",
    "barrier_before_reuse",
    "warp_barrier",
    "named_barrier",
    "uncommitted_copy",
    "copy_not_waited_for",
    "wrong_fragment_lane",
    "tail_off_by_one",
]


def test_every_fault_is_listed():
    assert sorted([*REFUSED, *WRONG]) == sorted(E.faults)


@pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "shuffled"])
@pytest.mark.parametrize("name", sorted(E.faults))
def test_correct_kernels_pass_and_do_not_depend_on_the_order(name, order):
    got = fault(name, False, order)
    assert torch.isfinite(got).all()
    assert torch.equal(got, fault(name, False, 0))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_fault_is_refused_with_its_place(name):
    if name == "outside_shared_unseen" and "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer ends the process there")
    for order in range(3):
        with pytest.raises(RuntimeError, match=f"{name}: block \\(0, 0\\).*{REFUSED[name]}"):
            fault(name, True, order)


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_changes_the_numbers(name):
    """In at least one order of the threads: which is why the derived tests take three."""
    right = fault(name, False)
    seen = [torch.equal(fault(name, True, order), right) for order in range(3)]
    assert not all(seen), f"{name} was not seen in any order"


def test_a_refused_launch_leaves_the_emulator_usable():
    with pytest.raises(RuntimeError):
        fault("deadlock", True)
    assert torch.equal(fault("deadlock", False), torch.arange(64.0))


def test_switching_threads_is_cheap():
    """0.06 us where this was written; at 5 us the derived tests would take minutes."""
    before, start = E.switches(), time.perf_counter()
    for _ in range(200):
        fault("missing_barrier", False)
    assert (time.perf_counter() - start) / (E.switches() - before) < 5e-6
