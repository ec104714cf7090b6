"""N-grams of tokens, hashed into buckets: one hash for arrays of numpy and of torch, on any device.

An n-gram that holds the token that ends documents is left out, so none reaches from one document into the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

Array = TypeVar("Array")
"""A numpy array or a torch tensor."""
_FIRST, _SECOND = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
"""Factors of MurmurHash3's finalizer as int64: torch has no uint64, and a product's low 64 bits are the same."""


def hashed_ngrams(tokens: Array, usable: Array, max_ngram: int) -> Iterator[tuple[Array, Array]]:
    """For n = 1 … ``max_ngram``: (hashes int64, complete bool), [..., t - n + 1], of the n-grams that start at a place.

    tokens: int64 [..., t]; usable: bool [..., t]. An n-gram is complete if all its tokens are usable.
    """
    hashes = _mix(tokens)
    ngram, complete = hashes, usable
    yield ngram, complete
    for length in range(2, max_ngram + 1):  # the hash of the n-gram without its last token, and that token's
        ngram = _mix(ngram[..., :-1] * 31 + hashes[..., length - 1 :])
        complete = complete[..., :-1] & usable[..., length - 1 :]
        yield ngram, complete


def bucket_of(hashes: Array, buckets: int) -> Array:
    """int64: the remainder of each hash, read as an unsigned number, by ``buckets``, at most 2^62 of them."""
    if buckets & (buckets - 1) == 0:
        return hashes & (buckets - 1)
    return (_shifted(hashes, 1) % buckets * 2 + (hashes & 1)) % buckets


class NgramBuckets:
    """Buckets of all n-grams, n = 1 … ``max_ngram``, in rows of tokens; those with the token ``eod`` are left out."""

    def __init__(self, buckets: int, max_ngram: int, eod: int) -> None:
        self.buckets, self.max_ngram, self.eod = buckets, max_ngram, eod

    def of(self, tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, bucket) int64 [n-grams] of ``tokens`` [t], which stand in ``rows`` at ``columns``, in order."""
        found_rows, found = [], []
        ngrams = hashed_ngrams(tokens.astype(np.int64), tokens != self.eod, self.max_ngram)
        for before, (hashes, complete) in enumerate(ngrams):
            kept = complete & (columns[before:] >= before)  # within a row
            found_rows.append(rows[before:][kept])
            found.append(bucket_of(hashes[kept], self.buckets))
        return np.concatenate(found_rows), np.concatenate(found)

    def count(self, tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """int64 [buckets]: n-grams in each."""
        return np.bincount(self.of(tokens, rows, columns)[1], minlength=self.buckets)


def _mix(values: Array) -> Array:
    """A hash of each int64: the finalizer of MurmurHash3, whose every output bit depends on every input bit."""
    values = values ^ _shifted(values, 33)
    values = values * _FIRST
    values = values ^ _shifted(values, 33)
    values = values * _SECOND
    return values ^ _shifted(values, 33)


def _shifted(values: Array, bits: int) -> Array:
    """int64 moved to the right as an unsigned number: zeros come in from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
