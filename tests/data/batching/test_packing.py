from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_alignment.data.batching.collate import (
    collate_packed,
    collate_padded,
    collate_responses,
    filled,
    local_positions,
    pad_prompts,
)
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, Stretch, pack
from lit_alignment.data.encoding.example import Example


def plan(number=101, tokens=256, **settings):
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 200, number)
    options = {"batch_size": 4, "shuffle": True, "seed": 3, "tokens_per_batch": tokens}
    return BatchPlan(lengths, **({"weights": lengths / 2.0} | options | settings))


def test_best_fit_worked_by_hand():
    """Capacity 10, lengths 7 5 4 3 1: 7 opens a row, 5 another; 4 fits best behind 5, 3 behind 7, 1 behind 5 + 4."""
    assert pack([7, 5, 4, 3, 1], 10) == [[0, 3], [1, 2, 4]]


def test_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens, but a row holds 10"):
        pack([11], 10)


def test_longer_example_has_a_row_of_its_own_in_every_epoch():
    lengths = np.array([30, 300, 40, 256, 20])
    planned = BatchPlan(lengths, lengths / 1.0, 256, batch_size=4, shuffle=True, seed=0)
    for epoch in range(3):
        groups = planned.groups(epoch)
        assert sorted(map(sorted, groups)) == [[0, 2, 4], [1], [3]]


def test_every_example_stands_once_in_each_epoch_and_rows_fit():
    planned = plan()
    for epoch in range(3):
        groups = planned.groups(epoch)
        assert sorted(i for group in groups for i in group) == list(range(101))
        assert all(planned.lengths[group].sum() <= 256 for group in groups)
        assert len(groups) == len(planned.groups(0))
    assert planned.groups(0) != planned.groups(1)
    assert planned.groups(1) == plan().groups(1)


def test_packing_wastes_little():
    planned = plan(number=2000, tokens=1024)
    filled = planned.lengths.sum() / (len(planned.groups(0)) * 1024)
    assert filled > 0.98


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("tokens", [None, 256])
def test_window_weight_is_what_its_batches_on_all_ranks_hold(world_size, accumulate, tokens):
    planned = plan(tokens=tokens)
    ranks = [planned.batches(planned.groups(1), rank, world_size, accumulate) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for start in range(0, len(ranks[0]), accumulate):
        window = [b for batches in ranks for b in batches[start : start + accumulate]]
        real = [b for b in window if not b.dummy]
        weight = sum(planned.weights[b.indices].sum() for b in real)
        assert {round(b.window_weight, 6) for b in window} == {round(weight, 6)}
        seen += [i for b in real for i in b.indices]
    assert sorted(seen) == list(range(101))


def test_limit_cuts_the_last_window_and_its_weight():
    planned = plan()
    batches = planned.batches(planned.groups(0)[:6], accumulate=4)
    assert len(batches) == 6
    assert batches[-1].window_weight == pytest.approx(sum(planned.weights[b.indices].sum() for b in batches[4:]))


def test_chats_have_a_total_of_their_own_and_no_part_in_estimates():
    weights, chat_tokens = np.array([2.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.0, 3.5, 0.0, 4.0, 0.5])
    planned = plan(5, None, weights=weights, chat_tokens=chat_tokens, batch_size=2, shuffle=False)
    first, second, third = planned.batches(planned.groups(0), accumulate=2)
    assert (first.window_weight, first.window_chat_tokens) == (3.0, 7.5) and first.window == [[0], [2]]
    assert (second.window_weight, second.window_chat_tokens) == (3.0, 7.5) and second.window == []
    assert (third.window_weight, third.window_chat_tokens) == (0.0, 0.5) and third.window == [[]]


EXAMPLES = [Example([1, 2, 3], [-100, 2, 3], [0.0, 1.0, 1.0]), Example([4, 5], [4, 5], [0.5, 0.5])]


def test_packed_row():
    batch = collate_packed(EXAMPLES, 7.0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    # The first token of the second document has no prediction: 3 stands before it, in another document.
    assert batch.read_at.tolist() == [0, 1, 3] and batch.targets.tolist() == [2, 3, 5]
    assert batch.weights.tolist() == [1.0, 1.0, 0.5] and batch.lengths == [2, 1] and batch.groups == [1, 1]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.document_lengths == [3, 2] and batch.attention_mask is None
    assert batch.num_tokens == 5 and batch.window_weight == 7.0


def test_padded_rows_are_masked_by_position():
    batch = collate_padded(EXAMPLES, pad_token_id=3)  # 3 is also a trained token
    assert batch.input_ids.shape == (2, 8)
    assert batch.read_at.tolist() == [0, 1, 8] and batch.targets.tolist() == [2, 3, 5]
    assert batch.attention_mask.sum(1).tolist() == [3, 2] and batch.num_tokens == 5


RESPONSES = [
    [Example([1, 2, 3, 4], [-100, -100, 3, 4], [0, 0, 1.0, 2.0]), Example([1, 2, 9], [-100, -100, 9], [0, 0, 1.0])],
    [Example([7, 8], [-100, 8], [0, 1.0])],
]


def test_responses_of_a_record_share_a_prompt_up_to_the_token_before_the_first_target():
    """The hidden state of that token predicts the first target, so each response has its own."""
    batch = collate_responses(RESPONSES, share=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 2, 9, 7, 8]]
    assert batch.document_lengths == [1, 3, 2, 2] and batch.document_parents == [-1, 0, 0, -1]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 0, 1]]
    assert batch.read_at.tolist() == [1, 2, 4, 6] and batch.targets.tolist() == [3, 4, 9, 8]
    assert batch.weights.tolist() == [1.0, 2.0, 1.0, 1.0]
    assert batch.lengths == [2, 1, 1] and batch.groups == [2, 1] and batch.num_trained == 4


@pytest.mark.parametrize("pad_token_id", [None, 0], ids=["packed", "padded"])
def test_targets_are_the_tokens_after_the_positions_whatever_the_rows(pad_token_id):
    batch = collate_responses(RESPONSES, pad_token_id)
    assert batch.input_ids.flatten()[batch.read_at + 1].tolist() == batch.targets.tolist() == [3, 4, 9, 8]
    assert batch.lengths == [2, 1, 1] and batch.groups == [2, 1]


def test_filled_row_ends_in_a_document_of_padding_that_nothing_reads():
    batch = collate_responses(RESPONSES, share=True)
    full = filled(batch, 11, 5)  # 11 is rounded up to 16
    assert full.input_ids.tolist() == [[*batch.input_ids[0].tolist(), *[5] * 8]]
    assert full.position_ids.tolist() == [[*batch.position_ids[0].tolist(), *range(8)]]
    assert full.document_lengths == [1, 3, 2, 2, 8] and full.document_parents == [-1, 0, 0, -1, -1]
    assert full.num_tokens == batch.num_tokens == 8 and full.read_at is batch.read_at
    assert filled(full, 16, 5) is full and filled(full, 15, 5) is full
    assert filled(full, 7, 5).input_ids.shape == (1, 16) and filled(full, 24, 5).input_ids.shape == (1, 24)
    padded = collate_responses(RESPONSES, 0)
    assert filled(padded, 11, 5) is padded


def test_positions_of_a_slice_are_found():
    read_at = torch.tensor([0, 1, 3, 5])
    assert [local_positions(read_at, slice(*ends)).tolist() for ends in ((0, 2), (2, 5), (5, 6))] == [[0, 1], [2], [3]]


def test_prompts_are_padded_on_the_left():
    ids, mask = pad_prompts([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("tokens", [None, 256], ids=["padded", "packed"])
def test_epoch_goes_on_where_it_was_left_and_another_plan_trains_the_other_records(tokens):
    planned = plan(tokens=tokens)
    groups = planned.groups(1)
    own = Stretch(tokens, planned.batch_size, 5)
    assert planned.left(1, []) == groups and planned.left(1, [own]) == groups[5:]
    trained = [index for group in groups[:5] for index in group]
    for settings in ({"tokens_per_batch": None, "batch_size": 3}, {"tokens_per_batch": 300}):
        other = replace(planned, **settings)
        left = other.left(1, [own])
        assert sorted([*trained, *(index for group in left for index in group)]) == list(range(101))
        second = Stretch(*other.settings, 2)
        last = planned.left(1, [own, second])  # and back again
        seen = [*trained, *(i for group in left[:2] for i in group), *(i for group in last for i in group)]
        assert sorted(seen) == list(range(101))


def test_stretches_that_look_alike_are_told_apart():
    """Two batches of two, one of three, and two of two again, of twenty records."""
    planned = plan(number=20, tokens=None, batch_size=2)
    three = replace(planned, batch_size=3)
    stretches = [Stretch(None, 2, 2), Stretch(None, 3, 1), Stretch(None, 2, 2)]
    trained = [*planned.left(1, [])[:2], *three.left(1, stretches[:1])[:1], *planned.left(1, stretches[:2])[:2]]
    rest = planned.left(1, stretches)
    assert sorted(index for group in [*trained, *rest] for index in group) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_follows_the_plan_of_the_epoch(workers):
    planned = plan(tokens=None)
    loader = PlannedLoader(lambda epoch: planned.batches(planned.groups(epoch)), _indices, 17, num_workers=workers)
    for epoch in (2, 0):
        loader.set_epoch(epoch)
        assert [batch.tolist() for batch in loader] == planned.groups(epoch)
    assert len(loader) == 17


def _indices(planned):
    return torch.tensor(planned.indices)
