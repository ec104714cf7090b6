"""Counts of hashed n-grams in a shard and in a reference set, and the importance weights these give."""

from __future__ import annotations

import numpy as np

from megatron_bliss.data.batches import BatchSource, UnitDataset
from megatron_bliss.data.ngrams import NgramBuckets
from megatron_bliss.selection.score_pass import BLOCK_UNITS

SMOOTHING = 1e-8
"""Added to both distributions, as the paper's code does: a bucket that one of them lacks weighs heavily."""


def log_ratios(reference: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """log(p_j / q_j), float64 [buckets], of counts; ValueError where one of the two has no n-gram at all."""
    for name, counts in (("reference set", reference), ("shard", pool)):
        if not counts.sum():
            raise ValueError(f"found no n-gram in the {name}, expected text: check its tokens and its eod token")
    p, q = reference / reference.sum(), pool / pool.sum()
    return np.log(p + SMOOTHING) - np.log(q + SMOOTHING)


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
        batch = reference.batch(np.arange(start, min(start + BLOCK_UNITS, len(reference))))
        real = np.arange(batch.tokens.shape[1])[None, :] < batch.lengths.numpy()[:, None]
        rows, columns = np.nonzero(real)
        total += counter.count(batch.tokens.numpy()[real], rows, columns)
    return total


def log_weights(counter: NgramBuckets, source: UnitDataset, ids: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """float32 [n]: importance log-weights of units."""
    rows, buckets = counter.of(*_read(source, ids))
    return np.bincount(rows, weights=log_ratio[buckets], minlength=len(ids)).astype(np.float32)
