"""What was decided for a call serves only calls that look like it (vkernels/remember.py).

Calls of every op, taken from its cases and its refusals, follow each other with ones bent in one respect: each must do
what it does when nothing is remembered. Then how much the host does for a call that is remembered, in function calls,
which no other load on the machine changes.

Planted and seen red here: shapes, strides, dtypes, gradients asked for and the grad mode left out of the look; 1, 1.0
and True alike; 0.0 and -0.0 alike; a list's length left out; the backend asked for left out; the form of a mask, of a
cache, of a plan left out; a subclass of tensors taken for one; a launcher that keeps the tensor it was planned with.
"""

from __future__ import annotations

import math
import sys
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_unflatten

import vkernels as vk
from benchmarks.launch import calls
from vkernels import remember
from vkernels.kv_cache import KVCache
from vkernels.masks import MaskPlan, VideoMask
from vkernels.remember import Form, Unlike, forget, look, remembered
from vkernels.spec import Maker, all_specs

SPECS = {spec.name: spec for spec in all_specs()}
MOST_CALLS = 85  # of functions, Python's and C's, for one call of an op
MORE_CALLS = {  # two ops; two ops, and positions of tokens; pages of two sequences
    ("attention", "rope"): 115,
    ("divided_attention", "temporal-rope"): 130,
    ("divided_attention", "temporal-rope-pairs"): 130,
    ("divided_attention", "temporal-rope-long"): 130,
    ("kv_append", "int4-paged"): 135,
}


@pytest.fixture(autouse=True)
def _from_nothing():
    forget()
    yield
    forget()


# ---- looks ---------------------------------------------------------------------------------------------------------


def test_what_differs_looks_different():
    x = torch.zeros(2, 3, 4)
    values = [
        x, x[:1], x.mT, x.mT.contiguous().mT, x.double(), x.to("meta"), x.clone().requires_grad_(), x[..., ::2],
        None, 1, 1.0, True, 0.0, -0.0, "1", [1], (1,), [1.0], [], [[]], [None], [1, 1], torch.float32,
        torch.device("cpu"), x.shape, vk.Grid(1, 2, 3), Form(1), Form(1.0), Form([1]),
    ]  # fmt: skip
    assert len({tuple(look([value])) for value in values}) == len(values)
    assert look([x, 1]) == look([torch.ones(2, 3, 4), 1])
    assert look([[x, x], x]) != look([[x], x, x]) != look([[x, [x]], x])


def test_what_may_change_looks_like_nothing():
    class Sub(torch.Tensor):
        pass

    for value in (Sub(), {}, object(), VideoMask.causal(3), MaskPlan(1, 1, 1, 1, 1), NotImplemented, bytearray(1)):
        with pytest.raises(Unlike):
            look([value])


def test_decisions_are_made_once_and_refusals_never_kept():
    made = []

    @remembered
    def decide(x, y, *, why):
        made.append(why)
        if y < 0:
            raise ValueError("y must not be negative")
        return len(made)

    x = torch.zeros(3)
    assert [decide(x, 1, why="a"), decide(torch.ones(3), 1, why="b"), decide(x, 1.0, why="c")] == [1, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="y must not be negative"):
            decide(x, -1, why="d")
    assert made == ["a", "c", "d", "d"]
    with torch.no_grad():
        decide(x, 1, why="e")
    decide(torch.empty(3, dtype=torch.float64), 1, why="f")
    forget()
    decide(x, 1, why="g")
    assert made == ["a", "c", "d", "d", "e", "f", "g"]


def test_a_cache_with_other_storage_looks_different():
    cache = KVCache("bf16", b=1, m=1, d=8, capacity=4)
    before, cache.k_rows = cache.form, cache.storage("k_rows")[:, :, :2]
    assert cache.form != before


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(remember, "MOST", 10)
    decide = remembered(lambda n: n)
    assert [decide(n) for n in range(25)] == list(range(25))
    assert len(remember._known) <= 10


# ---- calls ---------------------------------------------------------------------------------------------------------


def _bent(x, how):
    """A tensor that differs from `x` in one respect."""
    if how == "wider":
        return torch.cat([x, x], -1) if x.dim() else x
    if how == "longer":
        return torch.cat([x, x], 0) if x.dim() else x
    if how == "strided":
        return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]
    if how == "double":
        return x.double()
    if how == "half":
        return x.half()
    return x.clone().requires_grad_(x.is_floating_point())


def _retyped(x):
    """A number that is equal, and not alike."""
    other = {bool: int, int: float, float: lambda v: -v if v == 0.0 else int(v) if v == int(v) else v}
    return other[type(x)](x) if type(x) in other and math.isfinite(x) else x


BENDS = ("wider", "longer", "strided", "double", "half", "grad")


def _others(spec, leaf):
    """Objects of a leaf's type in other cases: masks, plans, caches, specs, grids."""
    made = [x for case in spec.cases for x in tree_flatten(case.make(Maker(torch.float32)))[0]]
    return [x for x in made if type(x) is type(leaf)]


@st.composite
def sequences(draw):
    """One call and another that differs in one respect, again and again, by whichever backend."""
    spec = SPECS[draw(st.sampled_from(sorted(SPECS)))]
    case = draw(st.sampled_from([*spec.cases, *spec.rejects]))
    leaves, tree = tree_flatten(case.make(Maker(torch.float32)))
    i = draw(st.integers(0, len(leaves) - 1))
    if isinstance(leaves[i], torch.Tensor):
        bent = _bent(leaves[i], draw(st.sampled_from(BENDS)))
    elif leaves[i] is None or isinstance(leaves[i], (bool, int, float, str)):
        bent = _retyped(leaves[i])
    else:
        bent = draw(st.sampled_from([leaves[i], *_others(spec, leaves[i])]))
    both = [tree_unflatten(x, tree) for x in (leaves, [*leaves[:i], bent, *leaves[i + 1 :]])]
    order = draw(st.lists(st.integers(0, 1), min_size=1, max_size=2))
    backend, other = (draw(st.sampled_from((None, "triton", "triton", "reference", "nobody"))) for _ in "ab")
    calls = [(spec, both[j], backend, True) for j in (0, 1, *order)]
    return [*calls, (spec, both[0], other, False)]


def _outcome(spec, kwargs, backend, grad):
    """What a call gives, or what it would launch, or what it says."""
    from vkernels.triton.launch import recording

    kwargs = {name: x.clone() if isinstance(x, KVCache) else x for name, x in kwargs.items()}
    leaves = tree_flatten(kwargs)[0]
    names = {x.data_ptr(): i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and not x.is_sparse}

    def seen(x):
        return (tuple(x.shape), x.stride(), x.dtype, names.get(x.data_ptr())) if isinstance(x, torch.Tensor) else x

    try:
        with torch.set_grad_enabled(grad), recording() as launches:
            result = spec.fn(**{n: x.clone() if spec.name == "apply_rope" and kwargs.get("inplace") and n in "qk"
                                else x for n, x in kwargs.items()}, backend=backend)  # fmt: skip
    except Exception as error:
        return type(error), str(error)
    results = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
    if launches:
        noted = [(one.name, one.grid, one.options, {n: seen(x) for n, x in one.arguments.items()}) for one in launches]
        return noted, [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in results]
    return [(x.detach().nan_to_num(7.0).tolist(), x.dtype, x.requires_grad) for x in results]


def _hold_against_alone(sequence):
    if remember.library.find_spec("triton") is None:
        sequence = [call for call in sequence if call[2] != "triton"]
    forget()
    for call in sequence:
        got = [_outcome(*call) for _ in range(3)]  # anew or as something earlier; remembered; through its door
        kept = dict(remember._known)
        forget()
        alone = _outcome(*call)
        forget()
        remember._known.update(kept)
        assert got == [alone] * 3
    assert not _tensors(list(remember._known.values()), set())


@settings(max_examples=100)
@given(sequences())
def test_calls_do_what_they_do_alone(sequence):
    _hold_against_alone(sequence)


@pytest.mark.parametrize("name", ["attention", "decode_attention", "kv_append", "rearrange"])
def test_masks_caches_and_plans_are_told_apart(name):
    """The tensors of every case, with the mask, the cache or the plan of every other."""
    made = [case.make(Maker(torch.float32)) for case in SPECS[name].cases]
    objects = [(key, x) for kwargs in made for key, x in kwargs.items() if key in ("mask", "cache", "plan")]
    for kwargs in made:
        others = [(SPECS[name], {**kwargs, key: x}, "triton", False) for key, x in objects]
        _hold_against_alone(others[:: len(others) // 6 or 1] if name == "rearrange" else others)


def _tensors(x, past):
    """Tensors that can be reached from what is remembered."""
    if id(x) in past:
        return []
    past.add(id(x))
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, FunctionType):
        held = [cell.cell_contents for cell in x.__closure__ or ()] + list(x.__defaults__ or ())
        held += [x.__wrapped__] if hasattr(x, "__wrapped__") else []
    elif isinstance(x, dict):
        held = [*x, *x.values()]
    elif isinstance(x, (list, tuple)):
        held = list(x)
    else:
        held = []
    return [t for value in held for t in _tensors(value, past)]


# ---- what the host does --------------------------------------------------------------------------------------------


def function_calls(call) -> int:
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.skipif(remember.library.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
@pytest.mark.parametrize("name", SPECS)
def test_a_remembered_call_costs_the_host_little(name):
    from vkernels.triton.launch import discarding

    for case, call in calls(SPECS[name]).items():
        with discarding(), torch.no_grad():
            for _ in range(3):
                call()
            count = function_calls(call)
        assert count <= MORE_CALLS.get((name, case), MOST_CALLS), (case, count)
