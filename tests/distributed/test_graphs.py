"""vkernels.distributed under torch.compile(fullgraph=True), on 2 gloo processes: what the eager call computes.

Planted bugs that turn these red: a graph that serves another mask than its own; an agreement that is exchanged and not
judged; a refusal that the others are not told of; equal calls that the compiler makes one; a digest without the mask;
keys' gradients cut as their keys were; an agreement that gives no gradient; a trade that goes back as it came; a ring
without the gradient of its lse, or in another rank's seat.
"""

import pytest

pytest.importorskip("torch.distributed")
import graph_work as work
import work as eager

AGREED = {"all_gather_into_tensor", "wait_tensor"}
OWN = {
    "tokens": "hold the 12 tokens of rank 1, got 13",
    "trade": "axis must be one of temporal, spatial, got 'time'",
}


@pytest.mark.parametrize("kind", ["tokens", "gather", "heads", "ring", "trade"])
def test_a_call_is_one_graph(ranks, kind):
    for found in ranks(2).run(work.graphs, kind, "aot_eager", 4):
        assert found == AGREED | {"ring" if kind == "ring" else "all_to_all_single"}


def test_inductor(ranks):
    """The collectives that it orders, and code of its own between them."""
    assert ranks(2).run(work.graphs, "tokens", "inductor", 1)


def test_a_graph_meets_an_eager_call(ranks):
    assert all(ranks(2).run(work.mixed))


def test_dtensors_break_the_graph(ranks):
    assert all(ranks(2).run(work.dtensors))


@pytest.mark.parametrize("kind", ["mask", "tokens", "scheme", "gather", "trade", "second"])
def test_disagreement_is_refused_everywhere(ranks, kind):
    said = ranks(2).refused(work.disagree, kind)
    rule = "be accepted by every rank" if kind in OWN else "agree on every rank"
    assert rule in said[0]
    assert OWN.get(kind, rule) in said[1]
    assert all(ranks(2).run(eager.moved))  # and the group still works
