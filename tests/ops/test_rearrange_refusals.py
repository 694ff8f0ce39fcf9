"""What rearrange and its builders refuse, and with which sentence; native code below the Python door too."""

from __future__ import annotations

import pytest
import torch

import vkernels as vk
from vkernels import rearrangement as plans
from vkernels.check import ShapeError
from vkernels.library import native_missing, op

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(native_missing()), reason="no native"))]
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize(
    ("pattern", "sizes", "match"),
    [
        ("b s c", {}, r"pattern 'b s c' must have exactly one '->'"),
        ("b (s c -> b s c", {}, r"pattern 'b \(s c -> b s c' must close every parenthesis"),
        ("b ((s) c) -> b s c", {}, "must not nest parentheses"),
        ("b s) -> b s", {}, "must open a parenthesis"),
        ("b b c -> b c", {}, "must name an axis once per side, got 'b'"),
        ("b s c -> b c", {}, r"must keep every input axis .*, got 's'"),
        ("b c -> b r c", {}, "must be given the size of an axis it repeats, got 'r'"),
        ("b c -> c b", {"z": 3}, "must name every axis that has a size, got z=3"),
        ("b c -> c b", {"b": -1}, "must have sizes that are whole and not negative, got b=-1"),
        ("b ... c -> c b", {}, "must hold axis names, 1 and parentheses only"),
    ],
)
def test_pattern_errors_quote_the_pattern(pattern, sizes, match):
    with pytest.raises(ValueError, match=match) as caught:
        plans.from_einops(pattern, **sizes)
    assert pattern in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: plans.keep(indices=torch.tensor([4]), n=4), IndexError, r"keep: rows must lie in \[-1, 3\], got 4"),
        (lambda: plans.keep(indices=torch.tensor([-2]), n=4), IndexError, "got -2"),
        (lambda: plans.keep(torch.tensor([[True, False], [True, True]])), ValueError, r"per sample .*got \[1, 2\]"),
        (lambda: plans.keep(torch.tensor([1, 0])), TypeError, "mask must have dtype bool"),
        (lambda: plans.csr("x", [0, 2, 1], [0, 0], None, (1,)), ValueError, "ptr must start at 0 and never fall"),
        (lambda: plans.temporal(-1, 3), ValueError, "temporal: t must be at least 0, got -1"),
        (lambda: plans.temporal(2.0, 3), TypeError, "temporal: t must be an int, got float"),
        (lambda: plans.interleave_clips(2, 2, 3, frames=5), ValueError, r"frames must be at most m\*n=4, got 5"),
        (lambda: plans.merge_order(1, 3, 4), ValueError, "h must be a multiple of merge=2, got 3"),
        (lambda: plans.pool(1, 3, 3, mode="median"), ValueError, "mode must be 'mean', 'max' or 'bilinear'"),
        (lambda: plans.newline(1, 2, 2, mode="row"), ValueError, "mode must be one of grid, frame"),
        (lambda: plans.clusters(torch.tensor([0, 3]), 3), IndexError, r"labels must lie in -1..2, got 0..3"),
        (lambda: plans.pool(1, 2, 2).inverse, ValueError, "plan must move single rows of one source"),
        (
            lambda: plans.pool(1, 2, 2).compose(plans.keep(indices=torch.tensor([0]), n=3)),
            ShapeError,
            "must take 1 rows",
        ),
        (lambda: plans.assemble([("audio", 2)]), ValueError, "name parts 'text' or 'video', got 'audio'"),
    ],
)
def test_builders_refuse_with_a_sentence(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_sizes_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"x must be divisible as 'b \(h w\) c -> b h w c' says, got \(1, 7, 2\)"):
        vk.rearrange(torch.zeros(1, 7, 2), plans.from_einops("b (h w) c -> b h w c", h=2))
    with pytest.raises(ShapeError, match=r"with .'h', 'w'. unknown"):
        vk.rearrange(torch.zeros(1, 6, 2), plans.from_einops("b (h w) c -> b h w c"))
    with pytest.raises(ValueError, match="plan must hold 1 or 3 samples, got 2"):
        vk.rearrange(torch.zeros(3, 4, 2), plans.keep(indices=torch.zeros(2, 1, dtype=torch.int64), n=4))


@pytest.mark.skipif(bool(native_missing()), reason="no native")
def test_native_code_checks_what_becomes_an_address():
    run, into = op("rearrange_rows", "cpu"), op("rearrange_rows_into", "cpu")
    x = [torch.zeros(1, 4, 8)]

    def call(ptr, idx, weight=None):
        none = [None] * 8
        return run(x, ptr, idx, weight, *none, 0, 0, 1.0, 0.0, False, torch.float32)

    def ints(*rows):
        return torch.tensor([rows], dtype=torch.int32)

    for idx in (ints(0, 4), ints(-2), ints(2**31 - 1)):
        with pytest.raises(ValueError, match="rearrange: idx must hold rows below 4"):
            call(None, idx)
    with pytest.raises(ValueError, match="idx must hold rows below 4, got -1"):
        call(ints(0, 1), ints(-1))
    for ptr in (ints(0, 3), ints(2, 1), ints(-1, 1)):
        with pytest.raises(ValueError, match="ptr must rise from 0 to at most 2"):
            call(ptr, ints(0, 1))
    with pytest.raises(ValueError, match="idx must have dtype code 3"):
        call(None, torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"weight must have size 2"):
        call(None, ints(0, 1), torch.ones(1, 1))
    for rows in (ints(7, 0), ints(1, 1)):
        with pytest.raises(ValueError, match="rows must"):
            into(torch.zeros(1, 5, 8), x, None, ints(0, 1), *[None] * 6, rows, 0, 0, 1.0, 0.0, False)
    with pytest.raises(ValueError, match="steps must stay inside x"):
        op("rearrange_affine", "cpu")(torch.zeros(4, 4), [0, 1], [4, 4], [1, 2], [4, 4])


def test_values_print_compare_and_move():
    a = plans.temporal(2, 3)
    assert repr(a) == "RearrangePlan.temporal(6 rows -> 6)"
    assert repr(plans.frames(2)) == "RearrangePlan.frames('(b t) l c -> b (t l) c', t=2)"
    assert a == plans.temporal(2, 3)
    assert a != plans.temporal(3, 2)
    assert hash(a) == hash(plans.temporal(2, 3))
    assert a.to("cpu") == a
    assert (a.n_in, a.n_out) == (6, 6)
