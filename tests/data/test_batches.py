"""Batches are a function of (seed, step), not of the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bliss.data.batches import BatchSchedule, SampleOrder, UnitDataset, language_model_mask, rank_share
from megatron_bliss.data.corpus_writer import CorpusWriter


@pytest.fixture
def corpus(tmp_path) -> str:
    prefix = str(tmp_path / "corpus")
    lengths = np.arange(1, 14)
    with CorpusWriter(prefix, 1000) as writer:
        writer.add(np.concatenate([np.full(n, 10 * n) for n in lengths]), lengths)
    return prefix


def test_each_epoch_is_a_new_permutation() -> None:
    order = SampleOrder(7, seed=3)
    epochs = order.ids(0, 21).reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(order.ids(5, 16), epochs.reshape(-1)[5:16])
    assert not np.array_equal(SampleOrder(7, seed=4).ids(0, 7), epochs[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_ranks_share_the_same_global_batches(corpus: str, world_size: int) -> None:
    source = UnitDataset(corpus, 8)
    whole = BatchSchedule(source, 5, seed=1, rank=0, world_size=1)
    parts = [BatchSchedule(source, 5, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 1, 7, 2):
        ids = np.concatenate([part.at(step).unit_ids.numpy() for part in parts])
        assert np.array_equal(ids, whole.at(step).unit_ids.numpy())


def test_shares_are_contiguous_and_even() -> None:
    bounds = [rank_share(10, rank, 4) for rank in range(4)]
    assert bounds[0][0] == 0 and bounds[-1][1] == 10
    assert all(left[1] == right[0] for left, right in zip(bounds, bounds[1:], strict=False))
    assert {stop - start for start, stop in bounds} <= {2, 3}


def test_units_are_cut_padded_and_masked(corpus: str) -> None:
    batch = UnitDataset(corpus, 8).batch(np.array([1, 9, 4]))
    assert batch.tokens.shape == (3, 8)
    assert batch.lengths.tolist() == [2, 8, 5]
    assert batch.tokens[0].tolist() == [20, 20, 0, 0, 0, 0, 0, 0]
    assert batch.label_mask.sum(1).tolist() == [1, 7, 4]  # all real tokens but the first of each unit
    assert not batch.label_mask[:, 0].any()
    assert len(batch.slice(1, 3)) == 2 and batch.slice(1, 3).unit_ids.tolist() == [9, 4]
    assert torch.equal(batch.label_mask, language_model_mask(batch.lengths, 8))


def test_ids_beyond_the_vocabulary_are_named(corpus: str) -> None:
    ids = np.array([1, 9])
    largest = int(UnitDataset(corpus, 8).batch(ids).tokens.max())
    assert len(UnitDataset(corpus, 8, largest + 1).batch(ids)) == 2
    with pytest.raises(ValueError, match=f"to {largest} in .*, expected 0 to {largest - 1}: .*another tokenizer"):
        UnitDataset(corpus, 8, largest).batch(ids)


def test_impossible_sizes_are_refused(corpus: str) -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        SampleOrder(0, seed=1)
    with pytest.raises(ValueError, match="global batch of 0 samples, expected at least one"):
        BatchSchedule(UnitDataset(corpus, 8), 0, seed=1, rank=0, world_size=3)
