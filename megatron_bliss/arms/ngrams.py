"""Counts of hashed n-grams in a shard and in a reference set, and the importance weights these give."""

from __future__ import annotations

import numpy as np

from megatron_bliss.data.batches import BatchSource, UnitDataset
from megatron_bliss.data.guide import GuideSets
from megatron_bliss.data.ngrams import NgramBuckets
from megatron_bliss.selection.score_pass import BLOCK_UNITS

SMOOTHING = 1e-8
"""Added to both distributions, as the paper's code does: a bucket that one of them lacks weighs heavily."""


def log_ratios(reference: np.ndarray, pool: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """log(p_j / q_j), float64 [buckets], of counts; ValueError where one of the two has no n-gram at all.

    smoothing s: with c the reference's counts, p_j = (c_j + s m q_j) / (sum c + s m), so that p tends to q.
    """
    require_ngrams(reference, pool)
    q, smoothed = pool / pool.sum(), smoothed_counts(reference, pool, smoothing)
    p = smoothed / smoothed.sum()
    return np.log(p + SMOOTHING) - np.log(q + SMOOTHING)


def smoothed_counts(reference: np.ndarray, pool: np.ndarray, smoothing: float) -> np.ndarray:
    """float64 [buckets]: the reference's counts and ``smoothing`` n-grams per bucket, spread as the shard's are."""
    return reference + smoothing * len(pool) * (pool / pool.sum())


def blended(reference: np.ndarray, pool: np.ndarray, share: float) -> np.ndarray:
    """p, float64 [buckets] with sum 1: the reference's distribution with ``share`` of the shard's, of counts.

    0 where the shard has no n-gram; ValueError where one of the two has none at all.
    """
    require_ngrams(reference, pool)
    p = np.where(pool > 0, (1 - share) * (reference / reference.sum()) + share * (pool / pool.sum()), 0.0)
    return p / p.sum()


def require_ngrams(reference: np.ndarray, pool: np.ndarray) -> None:
    """ValueError where one of two bags of n-grams, counts [buckets] each, is empty."""
    for name, counts in (("reference set", reference), ("shard", pool)):
        if not counts.sum():
            raise ValueError(f"found no n-gram in the {name}, expected text: check its tokens and its eod token")


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
    """float64 [buckets] over the whole reference set: all its tokens, labelled or not.

    Of several sets, the sets' distributions have their weights as shares, and the sum is that of all counts.
    """
    if isinstance(reference, GuideSets):
        counts = np.stack([count_reference(counter, one) for one in reference.sets])
        sizes = counts.sum(1)
        if not sizes.all():
            name = reference.names[int(np.argmin(sizes))]
            raise ValueError(f"found no n-gram in the set {name} of the guide, expected text: check its tokens")
        return reference.weights / sizes @ counts * sizes.sum()
    total = np.zeros(counter.buckets)
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
