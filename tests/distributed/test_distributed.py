"""vkernels.distributed on 2 and 4 gloo processes: every mask kind equals one process, forward and backward.

Planted bugs that turn these red: a part merged twice; keys sent that are not needed (bytes); gradients that stay where
they were computed; a ring step that reads before it waits; heads put back in another order; a rank that does not say
what it was asked; a backward that is counted like its forward; the lse of sharded heads placed like that of tokens.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch.distributed")
import work
from ranks import Ranks

import vkernels as vk
from vkernels import distributed as vd
from vkernels.distributed.__main__ import SIZES, table
from vkernels.ops.attention.reference import plan_dense

MASKS = list(work.masks())


@pytest.mark.parametrize("scheme", ["ring", "gather", "heads"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_mask_equals_one_process(ranks, world, scheme):
    heads = (4, 4) if scheme == "heads" else (4, 2)
    for found in ranks(world).run(work.worst, MASKS, scheme, None, heads):
        assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("scheme", ["ring", "gather"])
def test_uneven_shards_and_empty_ones(ranks, scheme):
    """24 tokens in chunks of 5 over 4 ranks, of 16 over 4 (two ranks hold none), of 7 over 3 chunks' worth."""
    for chunk in (5, 16, 7):
        for found in ranks(4).run(work.worst, ["frame_causal", "keep", "window"], scheme, chunk, (4, 1)):
            assert max(found.values()) <= 1e-5, (chunk, found)


def test_bfloat16(ranks):
    for scheme in ("ring", "gather", "heads"):
        assert max(ranks(2).run(work.in_bfloat16, scheme)) < 0.02, scheme


def test_tokens_move_there_and_back(ranks):
    assert all(ranks(2).run(work.moved))


@pytest.mark.parametrize("lengths", [[5, 6], [0, 7], [9, 0]])
def test_a_cut_cache_decodes(ranks, lengths):
    assert max(ranks(2).run(work.decoded, lengths)) < 1e-5


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("cls", [0, 1])
def test_divided_attention_trades_places_for_frames(ranks, cls, turned):
    for world in (2, 4):
        assert max(ranks(world).run(work.divided, cls, turned)) < 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "checkpoint"])
def test_it_works_in_the_engines_people_run(ranks, kind):
    assert max(ranks(2).run(work.engine, kind)) < 1e-4


def test_dtensors_in_and_out(ranks):
    assert all(ranks(2).run(work.dtensors))


def test_a_mesh_or_a_group(ranks):
    assert all(ranks(2).run(work.meshes))


@pytest.mark.parametrize("kind", ["mask", "tokens", "shape", "dtype", "scheme", "gather", "trade"])
def test_disagreement_is_refused_everywhere(ranks, kind):
    said = ranks(2).refused(work.disagree, kind)
    rule = "be accepted by every rank" if kind == "tokens" else "agree on every rank"
    assert rule in said[0]
    assert ("hold the 12 tokens of rank 1, got 13" if kind == "tokens" else rule) in said[1]
    assert all(ranks(2).run(work.moved))  # and the group still works


@pytest.mark.parametrize("kind", ["dies", "hangs"])
def test_a_rank_that_is_gone_ends_the_others(kind):
    group = Ranks(2, timeout=4.0)
    try:
        group.start(work.leave, 1, kind)
        kind, said = group.answer(0, 60.0)
        assert kind == "raised"
        assert "Error" in said
    finally:
        group.close()


# ---- the deal, in this process

NAMES = st.sampled_from(MASKS)


@given(NAMES, st.integers(1, 6), st.one_of(st.none(), st.integers(1, 9)))
def test_parts_of_a_mask_are_the_mask(name, world, chunk):
    """Every shard against every shard, read literally, is the mask's own block; what is needed is what is seen."""
    mask = work.masks()[name]
    shards = vd.plan_shards(mask, world, chunk=chunk)
    assert torch.equal(shards.order.sort().values, torch.arange(24))
    if isinstance(mask, int):
        law = torch.ones(1, 24, 24, dtype=torch.bool)
    else:
        law = plan_dense(mask, torch.device("cpu")) if isinstance(mask, vk.MaskPlan) else mask.dense()
        law = law if law.dim() == 3 else law[None]
    for r, queries in enumerate(shards.tokens):
        for j, keys in enumerate(shards.tokens):
            block = law[:, queries][:, :, keys]
            if block.numel():
                got = plan_dense(shards.flat.part(queries, keys), torch.device("cpu"))
                assert torch.equal(got.expand_as(block) if len(got) == 1 else got, block.expand_as(got))
            seen = block.any(0).any(0).nonzero().flatten()
            assert set(seen.tolist()) <= set(shards.needs[r][j].tolist())
            if "window" not in name or name == "frame_window":
                assert torch.equal(seen, shards.needs[r][j])


def test_causal_is_dealt_like_the_zigzag():
    shards = vd.plan_shards(vk.VideoMask.causal(4096), 4, chunk=512)
    assert sorted(sorted((rows[::512] // 512).tolist()) for rows in shards.tokens) == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert shards.imbalance == 1.0
    assert "imbalance 1.000" in str(shards)


def test_the_page_has_the_models_table():
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    assert table({"131k": SIZES["131k"]}) in page


def test_a_deal_made_for_an_answer_serves_training():
    with torch.inference_mode():
        shards = vd.plan_shards(vk.VideoMask.causal(256), 2)
    assert not any(rows.is_inference() for rows in shards.tokens)


def test_dropped_tokens_weigh_nothing():
    keep = torch.arange(4096) < 1024
    shards = vd.plan_shards(vk.VideoMask.joint(vk.Grid(16, 16, 16)).keep(keep, queries=True), 4)
    assert shards.imbalance < 1.01
    assert [len(rows) for rows in shards.tokens] == [1024] * 4


def test_what_is_sent_is_what_is_seen():
    """A window over frames: a rank asks only its neighbours, however many ranks there are."""
    shards = vd.plan_shards(vk.VideoMask.frame_causal(vk.Grid(64, 8, 8), window=2), 8, chunk=512)
    for r in range(8):
        foreign = [j for j in range(8) if j != r and len(shards.needs[r][j])]
        assert len(foreign) <= 1
        assert sum(len(shards.needs[r][j]) for j in foreign) in (0, 64)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vd.plan_shards("causal", 2), "mask must be a VideoMask, a MaskPlan or a number of tokens"),
        (lambda: vd.plan_shards(8, 0), "world must be at least 1"),
        (lambda: vd.plan_shards(8, 2, chunk=0), "chunk must be at least 1"),
        (lambda: vd.attention(*[torch.ones(1, 8, 2, 8)] * 3, 8), "the process group must have been set up"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        call()
