"""A guide of several sets: which samples a batch has, on any number of ranks, and which are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bliss.data.batches import BatchSchedule
from megatron_bliss.data.guide import GuideSchedule, GuideSets, draw_samples
from tests.bilevel.trainers import RandomUnits

SIZES = (7, 20, 3)


def guide(weights=()) -> GuideSets:
    sets = [RandomUnits(size, seed, last=2 if seed else None) for seed, size in enumerate(SIZES)]
    return GuideSets(sets, ["a", "b", "c"], weights)


def test_samples_are_those_of_the_sets_in_the_order_asked_for() -> None:
    source, ids = guide(), np.array([29, 3, 7, 26, 27, 0])
    assert len(source) == 30 and source.set_of(ids).tolist() == [2, 0, 1, 1, 2, 0]
    batch = source.batch(ids)
    assert batch.unit_ids.tolist() == ids.tolist()
    for row, (number, unit) in enumerate([(2, 2), (0, 3), (1, 0), (1, 19), (2, 0), (0, 0)]):
        alone, length = source.sets[number].batch(np.array([unit])), batch.lengths[row]
        assert length == alone.lengths[0]
        assert torch.equal(batch.tokens[row, :length], alone.tokens[0, :length])
        assert torch.equal(batch.label_mask[row, :length], alone.label_mask[0, :length])
        assert not batch.tokens[row, length:].any() and not batch.label_mask[row, length:].any()
    assert source.batch(np.zeros(0, np.int64)).tokens.shape == (0, 0)


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_a_batch_has_as_many_of_every_set_on_any_number_of_ranks(world_size: int) -> None:
    source, options = guide([5, 1, 1]), {"seed": 4, "world_size": world_size}
    ranks = [GuideSchedule(source, 8, rank=rank, **options) for rank in range(world_size)]
    seen = []
    for step in range(12):
        ids = np.concatenate([schedule.at(step).unit_ids.numpy() for schedule in ranks])
        assert np.bincount(source.set_of(ids), minlength=3).tolist() == [2, 3, 3]
        alone = GuideSchedule(source, 8, seed=4, rank=0, world_size=1).at(step)
        assert ids.tolist() == alone.unit_ids.tolist()
        seen.append(ids)
    counts = np.bincount(np.concatenate(seen), minlength=30)
    assert counts[27:].tolist() == [12, 12, 12]  # three samples in every batch: each set goes through epochs of its own
    assert counts[:7].max() - counts[:7].min() <= 1 and counts[7:27].max() - counts[7:27].min() <= 1


def test_a_batch_without_room_for_every_set_is_refused() -> None:
    with pytest.raises(ValueError, match="found bilevel.validation_batch_size 2 with 3 sets in data.validation_prefix"):
        GuideSchedule(guide(), 2, seed=0, rank=0, world_size=1)


def test_samples_are_drawn_by_weight_and_small_sets_begin_anew() -> None:
    source = guide([2, 1, 1])
    ids = source.draw(24, np.random.default_rng(0))
    assert np.bincount(source.set_of(ids)).tolist() == [12, 6, 6]
    assert np.bincount(source.set_of(ids[:8])).tolist() == [4, 2, 2]  # so has every part of them
    assert np.bincount(ids, minlength=30)[27:].tolist() == [2, 2, 2]
    other = source.draw(24, np.random.default_rng(1))
    assert sorted(ids) != sorted(other)


def test_sets_that_weigh_nothing_are_not_drawn_but_are_in_every_batch() -> None:
    source = guide([1, 1, 0])
    assert np.bincount(source.set_of(source.draw(20, np.random.default_rng(0)))).tolist() == [10, 10]
    ids = GuideSchedule(source, 9, seed=0, rank=0, world_size=1).at(0).unit_ids.numpy()
    assert np.bincount(source.set_of(ids)).tolist() == [3, 3, 3]


def test_a_plain_set_is_drawn_without_replacement() -> None:
    ids = draw_samples(RandomUnits(9, 1), 20, np.random.default_rng(0))
    assert sorted(ids) == list(range(9))


def test_equal_weights_are_those_that_are_not_given() -> None:
    assert guide().weights.tolist() == guide([3, 3, 3]).weights.tolist()
    assert isinstance(GuideSchedule(guide(), 3, seed=0, rank=0, world_size=1), BatchSchedule)
