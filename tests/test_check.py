"""What refusals say, word for word."""

from __future__ import annotations

import pytest
import torch

from vkernels.check import ShapeError, bind, same_dtype
from vkernels.dispatch import Backend, NoBackend, choose


def test_bind_learns_sizes():
    q, k = torch.empty(2, 8, 4, 32), torch.empty(2, 5, 2, 32)
    assert bind("op", ("q", q, "b s n d"), ("k", k, "b u m d")) == {"b": 2, "s": 8, "n": 4, "d": 32, "u": 5, "m": 2}


def test_bind_shows_the_axes_so_far():
    with pytest.raises(ShapeError) as error:
        bind("rope", ("x", torch.empty(2, 8, 4, 32), "b s n d"), ("cos", torch.empty(2, 9, 16), "b s r"))
    assert str(error.value) == "rope: cos must have shape (b s r), got (2, 9, 16); axes so far: b=2 s=8 n=4 d=32"


def test_bind_accepts_one_only_where_it_is_offered():
    assert bind("op", ("x", torch.empty(3, 4), "b s"), ("y", torch.empty(1, 4), "b|1 s")) == {"b": 3, "s": 4}
    with pytest.raises(ShapeError):
        bind("op", ("x", torch.empty(3, 4), "b s"), ("y", torch.empty(1, 4), "b s"))


def test_bind_reads_literal_sizes():
    with pytest.raises(ShapeError, match=r"op: pos must have shape \(s 3\), got \(5, 2\)"):
        bind("op", ("pos", torch.empty(5, 2), "s 3"))


def test_bind_wants_tensors_on_one_device():
    with pytest.raises(TypeError, match=r"op: x must be a tensor, got list"):
        bind("op", ("x", [1, 2], "s"))
    with pytest.raises(TypeError, match=r"op: y must be on the device of x \(cpu\), got meta"):
        bind("op", ("x", torch.empty(1), "s"), ("y", torch.empty(1, device="meta"), "s"))


def test_same_dtype_names_both():
    with pytest.raises(TypeError, match=r"op: k must have the dtype of q \(float32\), got bfloat16"):
        same_dtype("op", ("q", torch.empty(1)), ("k", torch.empty(1, dtype=torch.bfloat16)))
    with pytest.raises(TypeError, match=r"op: q must have dtype float32, bfloat16, float16, got int64"):
        same_dtype("op", ("q", torch.empty(1, dtype=torch.int64)))


FIRST = Backend("first", lambda call: "the call is too large" if call > 3 else None, lambda call: "first")
SECOND = Backend("second", lambda call: "the call is too small" if call < 2 else None, lambda call: "second")


def test_choose_takes_the_first_that_can():
    assert choose("op", (FIRST, SECOND), None, 1).name == "first"
    assert choose("op", (FIRST, SECOND), None, 5).name == "second"


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(NoBackend, match="op: backend first cannot run this call: the call is too large"):
        choose("op", (FIRST, SECOND), "first", 5)


def test_nobody_can_lists_every_reason():
    with pytest.raises(NoBackend) as error:
        choose("op", (FIRST,), None, 5)
    assert str(error.value) == "op: no backend can run this call\n  first: the call is too large"
