"""transformers' mask closures as intervals: every known piece and combination against transformers' own dense mask.

Planted, one at a time, and seen red: causal one key short; a window one key long; the chunk ignoring left padding; the
block of a query ending one early; the offset of the queries dropped; the offset of the keys dropped; padding compacted
without moving the intervals; a static cache's unwritten end taken for padding; blocks in pieces taken for runs; packed
sequences one key long, without their inner mask, or planned from an older cu_seqlens.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vkernels as vk

masking = pytest.importorskip("transformers.masking_utils")
from vkernels_video.integrations import transformers as vkt  # noqa: E402
from vkernels_video.integrations.transformers import masks  # noqa: E402

vkt.register()


def ours(**arguments):
    made = masks.make_mask(**arguments)
    assert isinstance(made, masks.StructuredMask), made
    return made


def dense(**arguments):
    return masking.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]


def same(made, **arguments):
    want = dense(**arguments)
    assert torch.equal(made.dense().expand_as(want), want)


BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1], [0, 0, -1, -1, 1, 1, 1, 2]])
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [5, 0, 1, 2, 3, 4, 0, 1]])
PADS = torch.tensor([2, 0])
FUNCTIONS = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "sliding": masking.sliding_window_causal_mask_function(3),
    "sliding both ways": masking.sliding_window_bidirectional_mask_function(2),
    "chunked": masking.chunked_causal_mask_function(3, PADS),
    "blocks": masking.or_masks(masking.causal_mask_function, masking.blockwise_overlay(BLOCKS)),
    "blocks, sliding": masking.or_masks(
        masking.sliding_window_causal_mask_function(2), masking.blockwise_overlay(BLOCKS)
    ),
    "packed": masking.packed_sequence_compatibility_function(masking.causal_mask_function, POSITIONS, PACKED),
    "packed, sliding": masking.packed_sequence_compatibility_function(
        masking.sliding_window_causal_mask_function(2), POSITIONS, PACKED
    ),
}
PADDING = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]).bool(),
    "right": torch.tensor([[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]]).bool(),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1]]).bool(),
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_known_function_is_what_transformers_makes_of_it(function, padding):
    arguments = dict(
        batch_size=2, q_length=8, kv_length=8, mask_function=FUNCTIONS[function], attention_mask=PADDING[padding]
    )
    same(ours(**arguments), **arguments)


@pytest.mark.parametrize("q_length", [1, 3])
@pytest.mark.parametrize("function", ["causal", "sliding", "blocks", "chunked"])
def test_a_step_with_a_cache_starts_at_its_offset(function, q_length):
    arguments = dict(batch_size=2, q_length=q_length, kv_length=8, q_offset=8 - q_length)
    arguments |= dict(mask_function=FUNCTIONS[function], attention_mask=PADDING["left"])
    same(ours(**arguments), **arguments)


def test_a_static_cache_hides_its_unwritten_end_and_its_offset_is_a_tensor():
    arguments = dict(batch_size=2, q_length=3, kv_length=12, q_offset=torch.tensor(4))
    arguments |= dict(mask_function=FUNCTIONS["causal"], attention_mask=torch.ones(2, 7, dtype=torch.bool))
    made = ours(**arguments)
    assert made.plan.k_rows is None  # what is causal needs no list of live keys
    same(made, **arguments)


def test_a_sliding_cache_starts_at_its_key_offset():
    arguments = dict(batch_size=2, q_length=1, kv_length=4, q_offset=7, kv_offset=4)
    arguments |= dict(mask_function=FUNCTIONS["sliding"], attention_mask=PADDING["left"])
    same(ours(**arguments), **arguments)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_offsets_windows_and_padding_in_any_combination(data):
    s = data.draw(st.integers(1, 12))
    q = data.draw(st.integers(1, s))
    offset = data.draw(st.integers(0, s - q))
    window = data.draw(st.integers(1, s + 1))
    keep = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=s, max_size=s), min_size=2, max_size=2)))
    function = data.draw(
        st.sampled_from(
            (
                masking.causal_mask_function,
                masking.sliding_window_causal_mask_function(window),
                masking.sliding_window_bidirectional_mask_function(window),
                masking.or_masks(masking.causal_mask_function, masking.sliding_window_bidirectional_overlay(window)),
            )
        )
    )
    arguments = dict(
        batch_size=2, q_length=q, kv_length=s, q_offset=offset, mask_function=function, attention_mask=keep
    )
    same(ours(**arguments), **arguments)


def test_nothing_of_queries_times_keys_is_made(monkeypatch):
    s = 20_000
    monkeypatch.setitem(masks.PIECES, "sdpa_mask", None)
    keep = torch.ones(1, s, dtype=torch.bool)
    keep[:, :100] = False
    ids = torch.full((1, s), -1)
    ids[:, 1000:9000] = torch.arange(8000) // 100
    function = masking.or_masks(masking.causal_mask_function, masking.blockwise_overlay(ids))
    plan = ours(batch_size=1, q_length=s, kv_length=s, mask_function=function, attention_mask=keep).plan
    numbers = sum(x.numel() for x in (plan.ranges, plan.k_rows, plan.k_count))
    assert numbers <= 4 * s


def test_an_unknown_function_is_materialised_with_one_warning():
    def odd_keys(batch, head, q, kv):
        return kv % 2 == 1

    arguments = dict(batch_size=1, q_length=4, kv_length=4, mask_function=odd_keys)
    with pytest.warns(UserWarning, match="does not know the mask function .*odd_keys"):
        made = masks.make_mask(**arguments)
    assert torch.equal(made[:, 0], dense(**arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.make_mask(**arguments)


def test_blocks_in_pieces_are_no_intervals():
    ids = torch.tensor([[0, 0, 1, 0]])
    function = masking.or_masks(masking.causal_mask_function, masking.blockwise_overlay(ids))
    arguments = dict(batch_size=1, q_length=4, kv_length=4, mask_function=function)
    with pytest.warns(UserWarning, match="pieces"):
        made = masks.make_mask(**arguments)
    assert torch.equal(made[:, 0], dense(**arguments))


def test_a_full_bidirectional_mask_is_none_as_transformers_has_it():
    arguments = dict(batch_size=1, q_length=4, kv_length=4, mask_function=masking.bidirectional_mask_function)
    assert masks.make_mask(**arguments, allow_is_bidirectional_skip=True) is None
    assert bool(ours(**arguments).dense().all())


def test_a_finished_mask_passes_through_as_a_four_dimensional_one():
    made = ours(batch_size=2, q_length=8, kv_length=8, mask_function=masking.causal_mask_function)
    assert masks.make_mask(2, 8, 8, attention_mask=made) is made
    assert (made.ndim, made.dim(), made.shape, made.contiguous(), made.to("cpu")) == (4, 4, (2, 1, 8, 8), made, made)
    assert "causal" in repr(made)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 0, 5, 1], [7]])
def test_packed_sequences_see_themselves(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    s = int(cu[-1])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    q, k, v = torch.randn(3, 1, s, 2, 8)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=owner[:, None] == owner[None]
    ).transpose(1, 2)
    assert masks.packed_plan(cu, cu, s, s) is masks.packed_plan(cu, cu, s, s)  # one for all layers
    for keys in (cu, cu.clone()):  # the second time by ranges, whatever the lengths
        plan = masks.packed_plan(cu, keys, s, s)
        got = vk.attention(q, k, v, mask=plan)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_plan_of_packed_sequences_follows_its_tensor():
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    before = masks.packed_plan(cu, cu, 6, 6)
    cu[1] = 2
    after = masks.packed_plan(cu, cu, 6, 6)
    assert before.groups == 2
    assert after.ranges[0, 2].tolist() == [2, 6]
