"""Hashed n-grams of tokens: their counts in a shard and in a reference set, and the importance weights these give.

No n-gram reaches across the end of a document.
"""

from __future__ import annotations

import numpy as np

from megatron_bliss.data.batches import BatchSource, UnitDataset
from megatron_bliss.selection.score_pass import BLOCK_UNITS

SMOOTHING = 1e-8
"""Added to both distributions, as the paper's code does: a bucket that one of them lacks weighs heavily."""


class NgramBuckets:
    """Buckets of all n-grams, n = 1 … ``max_ngram``, in rows of tokens; those with the token ``eod`` are left out."""

    def __init__(self, buckets: int, max_ngram: int, eod: int) -> None:
        self.buckets, self.max_ngram, self.eod = buckets, max_ngram, eod

    def of(self, tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, bucket) int64 [n-grams] of ``tokens`` [t], which stand in ``rows`` at ``columns``, in order."""
        hashes, usable = _mix(tokens.astype(np.uint64)), tokens != self.eod
        found_rows, found = [], []
        ngram, complete = hashes, usable
        for length in range(1, self.max_ngram + 1):
            if length > 1:  # one token more: the hash of the n-gram that starts one before, and this token's
                ngram = _mix(ngram[:-1] * np.uint64(31) + hashes[length - 1 :])
                complete = complete[:-1] & usable[length - 1 :] & (columns[length - 1 :] >= length - 1)
            found_rows.append(rows[length - 1 :][complete])
            found.append((ngram[complete] % np.uint64(self.buckets)).astype(np.int64))
        return np.concatenate(found_rows), np.concatenate(found)

    def count(self, tokens: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """int64 [buckets]: n-grams in each."""
        return np.bincount(self.of(tokens, rows, columns)[1], minlength=self.buckets)


def log_ratios(reference: np.ndarray, pool: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """log(p_j / q_j), float64 [buckets], of counts; ValueError where one of the two has no n-gram at all.

    smoothing s: with c the reference's counts, p_j = (c_j + s m q_j) / (sum c + s m), so that p tends to q.
    """
    for name, counts in (("reference set", reference), ("shard", pool)):
        if not counts.sum():
            raise ValueError(f"found no n-gram in the {name}, expected text: check its tokens and its eod token")
    q = pool / pool.sum()
    smoothed = reference + smoothing * len(q) * q
    p = smoothed / smoothed.sum()
    return np.log(p + SMOOTHING) - np.log(q + SMOOTHING)


def _mix(values: np.ndarray) -> np.ndarray:
    """A hash of each uint64: the finalizer of MurmurHash3, whose every output bit depends on every input bit."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def _read(source: UnitDataset, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of units, and the row and column of each; units are cut as the target's samples are."""
    rows, columns, positions, _ = source.corpus.token_positions(ids, source.seq_length)
    return source.corpus.tokens[positions], rows, columns


def count_shard(counter: NgramBuckets, source: UnitDataset, rank: int, world_size: int) -> np.ndarray:
    """int64 [buckets] over this rank's blocks of the shard."""
    total = np.zeros(counter.buckets, dtype=np.int64)
    for start in range(rank * BLOCK_UNITS, len(source), world_size * BLOCK_UNITS):
        total += counter.count(*_read(source, np.arange(start, min(start + BLOCK_UNITS, len(source)))))
    return total


def count_reference(counter: NgramBuckets, reference: BatchSource) -> np.ndarray:
    """int64 [buckets] over the whole reference set: all its tokens, labelled or not."""
    total = np.zeros(counter.buckets, dtype=np.int64)
    for start in range(0, len(reference), BLOCK_UNITS):
        ids = np.arange(start, min(start + BLOCK_UNITS, len(reference)))
        total += np.bincount(ngrams_of(counter, reference, ids)[1], minlength=counter.buckets)
    return total


def ngrams_of(counter: NgramBuckets, source: BatchSource, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, bucket) int64 [n-grams] of samples of a reference set or shard: all their tokens, labelled or not."""
    rows, buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(ids), BLOCK_UNITS):
        batch = source.batch(ids[start : start + BLOCK_UNITS])
        real = np.arange(batch.tokens.shape[1])[None, :] < batch.lengths.numpy()[:, None]
        found, found_buckets = counter.of(batch.tokens.numpy()[real], *np.nonzero(real))
        rows.append(found + start)
        buckets.append(found_buckets)
    return np.concatenate(rows), np.concatenate(buckets)


def log_weights(counter: NgramBuckets, source: UnitDataset, ids: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """float32 [n]: importance log-weights of units."""
    rows, buckets = counter.of(*_read(source, ids))
    return np.bincount(rows, weights=log_ratio[buckets], minlength=len(ids)).astype(np.float32)


def mean_log_weights(counter: NgramBuckets, source: UnitDataset, ids: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """float32 [n]: importance log-weights of units per n-gram, 0 where they have none."""
    rows, buckets = counter.of(*_read(source, ids))
    sums = np.bincount(rows, weights=log_ratio[buckets], minlength=len(ids))
    return (sums / np.maximum(np.bincount(rows, minlength=len(ids)), 1)).astype(np.float32)
