"""RopeSpec and positions against numbers from outside: long-double golden frequencies, axis strings, transformers."""

from __future__ import annotations

import math

import pytest
import torch

from vkernels import RopeSpec, rope_positions
from vkernels.rope.axes import repeat

NAMES = "THW"
QWEN_YARN = {"scheme": "yarn", "factor": 4, "original": 32768}
LLAMA_YARN = {"scheme": "yarn", "factor": 16, "original": 4096}


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        (1e4, {}, {0: 1.0, 1: 8.659643234e-1, 16: 1e-1, 32: 1e-2, 63: 1.154781985e-4}),
        (1e6, {}, {1: 8.058421878e-1, 16: 3.162277660e-2, 32: 1e-3, 63: 1.240937761e-6}),
        (5e6, {}, {63: 2.545079788e-7}),
        (1e4, {"scheme": "ntk", "factor": 4}, {1: 8.471171852e-1, 32: 4.945289841e-3, 63: 2.886954962e-5}),
        (
            1e4,
            {"scheme": "dynamic", "factor": 2, "original": 2048, "length": 8192},
            {1: 8.396257426e-1, 63: 1.649688550e-5},
        ),
        (
            1e4,
            {"scheme": "ntk_vllm", "factor": 4, "mixed_b": 0.625},
            {0: 9.020936451e-1, 1: 7.387348190e-1, 63: 2.886954962e-5},
        ),
        (1e4, {"scheme": "ntk_vllm", "factor": 4}, {0: 4 ** (-2 / 128)}),
        (1e6, QWEN_YARN, {24: 5.375321491e-3, 32: 6.029411765e-4, 40: 4.445698525e-5}),
        (1e4, LLAMA_YARN, {24: 2.706179921e-2, 32: 5.673076923e-3, 40: 8.817889629e-4}),
        (
            5e5,
            {"scheme": "llama3", "factor": 8},
            {24: 7.292664737e-3, 32: 5.248461610e-4, 40: 3.428102196e-5, 63: 3.068925989e-7},
        ),
        (1e4, {"scheme": "linear", "factor": 4}, {63: 2.886954962e-5}),
    ],
)
def test_golden_frequencies(base, options, expected):
    spec = RopeSpec.build(128, base, **options)
    for j, value in expected.items():
        assert spec.freq[j] == pytest.approx(value, rel=1e-6), j


def test_attention_scales():
    assert RopeSpec.build(128, 1e6, **QWEN_YARN).scale == pytest.approx(1.138629436, rel=1e-9)
    assert RopeSpec.build(128, 1e4, **LLAMA_YARN).scale == pytest.approx(1.277258872, rel=1e-9)
    ones = [1.0] * 64
    long = {"short_factor": ones, "long_factor": ones, "original": 4096, "factor": 32}
    assert RopeSpec.build(128, 1e4, "longrope", **long).scale == pytest.approx(1.19023807, rel=1e-8)
    assert RopeSpec.build(128, 1e6, "ntk_by_parts", factor=4, original=32768).scale == 1.0


def test_proportional_keeps_the_exponent_of_the_whole_head():
    spec = RopeSpec.build(512, 1e6, "proportional", portion=0.25)
    assert spec.freq[63] == pytest.approx(3.337624694e-2, rel=1e-6)
    assert spec.freq[64:] == (0.0,) * 192


def test_untruncated_yarn_ramp():
    spec = RopeSpec.build(128, 1e6, **QWEN_YARN, truncate=False)
    keep = 1 - (24 - 23.5959) / (39.6509 - 23.5959)
    theta = 1e6 ** (-48 / 128)
    assert spec.freq[24] == pytest.approx(theta * keep + theta / 4 * (1 - keep), rel=1e-5)


def test_longrope_switches_at_the_original_window():
    args = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original": 16}
    short = RopeSpec.build(8, scheme="longrope", length=16, **args)
    long = RopeSpec.build(8, scheme="longrope", length=17, **args)
    assert long.freq[1] == pytest.approx(short.freq[1] / 2)


@pytest.mark.parametrize(
    ("axes", "sections", "string"),
    [
        ("mrope", (16, 24, 24), "T" * 16 + "H" * 24 + "W" * 24),
        ("mrope_interleaved", (24, 20, 20), "THW" * 20 + "TTTT"),
        ("mrope_interleaved", (11, 11, 10), "THW" * 10 + "TH"),
        ("glm4v", (8, 12, 12), "T" * 8 + "H" * 12 + "W" * 12),
        ("ernie", (22, 22, 20), "HW" * 22 + "T" * 20),
        ("videorope", (16, 24, 24), "HW" * 24 + "T" * 16),
        ("videorope_shifted", (16, 24, 24), "T" + "HW" * 23 + "H" + "T" * 16),
        ("hope", (16, 24, 24), "HW" * 24 + "-" * 16),
    ],
)
def test_axis_maps(axes, sections, string):
    spec = RopeSpec.build(2 * sum(sections), axes=axes, sections=sections)
    assert "".join("-" if a < 0 else NAMES[a] for a in spec.axis) == string


def test_repeating_maps_and_grids():
    assert "".join(NAMES[a] for a in repeat((0, 0, 1, 2, 1, 2, 1, 2), 16)) == "TTHWHWHW" * 2
    wan = RopeSpec.grid((44, 42, 42), layout="pair")
    assert [wan.axis.count(a) for a in range(3)] == [22, 21, 21]
    assert wan.freq[22] == wan.freq[43] == 1.0


def test_riflex():
    spec = RopeSpec.grid((16, 56, 56), 256.0, layout="pair").riflex(4, 66)
    assert spec.freq[3] == pytest.approx(0.0857, abs=5e-5)


def test_turns_are_exact():
    from fractions import Fraction

    spec = RopeSpec.build(128)
    _, turns = spec.tables(torch.device("cpu"))
    for f, t in zip(spec.freq, turns.tolist(), strict=True):
        assert abs(Fraction(t % 2**64, 2**64) - Fraction(f) / Fraction(math.tau)) < Fraction(1, 2**53)


def test_spec_is_a_value():
    spec = RopeSpec.build(16, axes=((0,) * 8, (1,) * 8))
    again = RopeSpec.from_dict(spec.to_dict())
    assert spec == again
    assert hash(spec) == hash(again)
    assert "freq" in repr(spec)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RopeSpec((7.0,)), r"RopeSpec: freq must lie in \[0, 2 pi\)"),
        (lambda: RopeSpec.build(7), "RopeSpec.build: d must be even"),
        (lambda: RopeSpec.build(8, scheme="magic"), "RopeSpec.build: scheme must be one of"),
        (lambda: RopeSpec.build(8, axes="mrope", sections=(1, 1, 1)), "RopeSpec: axis must name an axis for 4 pairs"),
        (lambda: rope_positions("magic", [1]), "rope_positions: kind must be one of"),
        (lambda: rope_positions("vanilla", [-1]), "rope_positions: parts must hold text lengths and .*, got -1"),
        (lambda: rope_positions("qwen2_vl", [(1, 2)]), "rope_positions: parts must hold"),
        (lambda: rope_positions("v2pe", [(1, 1, 2)], delta=math.nan), "rope_positions: delta must be finite, got nan"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_positions_worked_by_hand():
    got = rope_positions("qwen2_vl", [2, (2, 1, 2), 1])
    assert got.tolist() == [[0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 3, 2, 3, 4]]
    got = rope_positions("videorope", [1, (2, 3, 1), 1])
    assert got.tolist() == [[0, 1, 1, 1, 3, 3, 3, 4], [0, 0, 1, 2, 2, 3, 4, 4], [0, 1, 1, 1, 3, 3, 3, 4]]
    got = rope_positions("v2pe", [1, (1, 1, 3), 1], delta=0.25)
    assert got.tolist() == [[0, 1, 1.25, 1.5, 3]]
    assert rope_positions("tad", [1, (2, 1, 2), 1]).tolist() == [[0, 1, 2, 4, 5, 5]]
    got = rope_positions("qwen2_5_vl", [(3, 1, 1)], tokens_per_second=2, second_per_grid=0.25)
    assert got[0].tolist() == [0, 0.5, 1]


def restart(base, pairs):
    return [base ** (-j / pairs) for j in range(pairs)]


WAN, EIGHT = (restart(1e4, n) for n in (22, 8))
RECIPES = {
    # name: (head, axis of each pair, frequency of each pair, layout)
    "vit2d": (80, "H" * 20 + "W" * 20, restart(1e4, 20) * 2, "half"),
    "ggml_vision": (64, "H" * 16 + "W" * 16, restart(1e4, 16) * 2, "half"),
    "gemma4_vision": (72, "H" * 18 + "W" * 18, restart(1e4, 18) * 2, "axial"),
    "kimi_vision": (72, "WH" * 18, [f for f in restart(1e4, 18) for _ in "WH"], "pair"),
    "llama4_vision": (88, "W" * 22 + "H" * 22, WAN * 2, "pair"),
    "minimax_vision": (80, "T" * 13 + "H" * 13 + "W" * 13, restart(1e4, 13) * 3, "half"),
    "wan": (128, "T" * 22 + "H" * 21 + "W" * 21, WAN + restart(1e4, 21) * 2, "pair"),
    "hunyuan_video": (128, "T" * 8 + "H" * 28 + "W" * 28, restart(256.0, 8) + restart(256.0, 28) * 2, "pair"),
    "cogvideox": (64, "T" * 8 + "H" * 12 + "W" * 12, EIGHT + restart(1e4, 12) * 2, "pair"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    d, string, freq, layout = RECIPES[name]
    spec = RopeSpec.recipe(name, d)
    names = NAMES if "T" in string else "HW"
    assert "".join(names[a] for a in spec.axis) == string
    assert spec.freq == pytest.approx(freq, rel=1e-12)
    assert spec.freq_fp32 == pytest.approx(freq, rel=1e-6)
    assert spec.layout == layout


def test_llama4_vision_counts_from_one_and_leaves_cls():
    """Patch (x, y) turns by (x + 1) and (y + 1); the class token, at 0, does not."""
    from vkernels import apply_rope

    pos = torch.cat([rope_positions("grid2d", [(1, 2, 3)]) + 1, torch.zeros(2, 1, dtype=torch.int64)], dim=1)
    x = torch.tensor([1.0, 0.0] * 4).expand(1, 7, 1, 8)
    y = apply_rope(x, None, RopeSpec.recipe("llama4_vision", 8), pos)[0, :, 0]
    for token in range(6):
        row, col = divmod(token, 3)
        angles = [col + 1, (col + 1) / 100, row + 1, (row + 1) / 100]
        want = [f(a) for a in angles for f in (math.cos, math.sin)]
        assert y[token].tolist() == pytest.approx(want, abs=1e-6)
    assert torch.equal(y[6], x[0, 6, 0])


def test_xdrope_is_ntk_over_four_axes():
    from vkernels.rope.axes import chunked

    spec = RopeSpec.build(128, 1e4, "ntk", factor=1000.0, axes=chunked((16, 16, 16, 16)))
    base = 1e4 * 1000 ** (128 / 126)
    assert spec.freq == pytest.approx([base ** (-j / 64) for j in range(64)], rel=1e-12)
    assert spec.axis == (0,) * 16 + (1,) * 16 + (2,) * 16 + (3,) * 16
    assert spec.n_axes == 4


def test_videorope_plus_plus_slows_time_only():
    spec = RopeSpec.build(128, 1e6, axes="videorope", sections=(16, 24, 24))
    longer = spec.retimed(1e6, original=1025, length=4097)
    assert longer.freq[:48] == spec.freq[:48]
    base = 1e6 * 4 ** (128 / 126)
    assert longer.freq[48:] == pytest.approx([base ** (-j / 64) for j in range(48, 64)], rel=1e-12)


def test_mhrope_one_axis_per_head():
    from vkernels.rope.axes import per_head

    spec = RopeSpec.build(8, axes=(*per_head((2, 3, 2), 4), (-1,) * 4))
    assert [row[0] for row in spec.axis_rows] == [0, 0, 1, 1, 1, 2, 2, -1]
    assert all(len(set(row)) == 1 for row in spec.axis_rows)


@pytest.mark.parametrize("factor", [(2, 20221.26), (4, 40889.94), (8, 82684.62), (16, 167198.74)])
def test_ntk_bases(factor):
    s, base = factor
    spec = RopeSpec.build(128, 1e4, "ntk", factor=s)
    assert spec.freq[1] ** -64 == pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize("kind", ["vrope", "rope_tie", "circle", "mrope_i"])
def test_positions_without_a_formula_are_refused(kind):
    with pytest.raises(ValueError, match=f"rope_positions: kind must be one of vanilla, qwen2_vl, .*, got '{kind}'"):
        rope_positions(kind, [1])


@pytest.mark.parametrize(
    ("name", "d", "match"),
    [("magic", 8, "name must be one of vit2d, .*, got 'magic'"), ("wan", 4, "d must give every axis of wan an even")],
)
def test_recipes_refused(name, d, match):
    with pytest.raises(ValueError, match=f"RopeSpec.recipe: {match}"):
        RopeSpec.recipe(name, d)
