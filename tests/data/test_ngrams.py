"""Hashes and buckets of n-grams against whole numbers of Python, in numpy and in torch alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bliss.data.ngrams import NgramBuckets, bucket_of, hashed_ngrams

MASK = 2**64 - 1


def mixed(value: int) -> int:
    """MurmurHash3's finalizer of an unsigned number of 64 bits."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor & MASK
    return value ^ value >> 33


def hash_of(ngram: list[int]) -> int:
    found = mixed(ngram[0])
    for token in ngram[1:]:
        found = mixed((found * 31 + mixed(token)) & MASK)
    return found


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_hashes_are_those_of_whole_numbers(kind) -> None:
    rows = np.random.default_rng(1).integers(0, 60_000, (3, 7))
    usable = rows % 5 != 0
    for length, (hashes, complete) in enumerate(hashed_ngrams(kind(rows), kind(usable), 3), start=1):
        starts = range(7 - length + 1)
        expected = [[hash_of(row[i : i + length].tolist()) for i in starts] for row in rows]
        assert (np.asarray(hashes).astype(np.uint64) == np.array(expected, dtype=np.uint64)).all()
        assert np.asarray(complete).tolist() == [[bool(row[i : i + length].all()) for i in starts] for row in usable]
        for buckets in (1, 7, 64, 10_000, 2**31 - 1):
            found = np.asarray(bucket_of(hashes, buckets)).tolist()
            assert found == [[value % buckets for value in row] for row in expected]


def test_no_row_is_long_enough_for_every_ngram() -> None:
    for length in (0, 1):
        sizes = [len(hashes) for hashes, _ in hashed_ngrams(torch.arange(length), torch.ones(length) > 0, 3)]
        assert sizes == [length, 0, 0]


def test_no_ngram_reaches_over_a_row_or_a_documents_end() -> None:
    rows, columns = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 2, 0, 1, 0])
    tokens = np.array([5, 0, 6, 7, 8, 9])
    found_rows, found = NgramBuckets(1000, 2, eod=0).of(tokens, rows, columns)
    expected = [(0, [5]), (0, [6]), (1, [7]), (1, [8]), (2, [9]), (1, [7, 8])]
    assert list(zip(found_rows.tolist(), found.tolist(), strict=True)) == [(r, hash_of(g) % 1000) for r, g in expected]
