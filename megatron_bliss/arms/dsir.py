"""Data selection by importance resampling (DSIR, arXiv 2302.03169), on hashed n-grams of tokens.

Two bags of n-grams, hashed into m buckets, are counted: q over the round's shard, p over the reference set. A unit with
bucket counts c has the importance log-weight sum_j c_j log(p_j / q_j). Adding independent standard Gumbel noise makes
the k best units a sample of k without replacement, with probabilities in proportion to the weights.

The paper's n-grams are of words. These are of the corpus's own tokens, so that no text is needed, and none reaches
across the end of a document.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.base.parallel import barrier, failing_together
from megatron_bliss.config.baselines import BaselinesConfig
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.selection.score_pass import BLOCK_UNITS, ScorePass, gather_scores, score_blocks

SMOOTHING = 1e-8
"""Added to both distributions, as the paper's code does: a bucket that one of them lacks weighs heavily."""


def dsir_scores(config: BaselinesConfig, inputs: Inputs) -> Scores:
    """Importance log-weights with Gumbel noise; each rank counts and scores its part of the shard."""
    options, groups, source = config.dsir, inputs.groups, inputs.source
    counter = NgramBuckets(options.buckets, options.max_ngram, inputs.eod)
    with failing_together(groups):
        pool = _count(counter, source, groups.rank, groups.world_size)
        reference = _count_reference(counter, inputs.reference)
    pool = torch.from_numpy(pool).to(groups.device)
    dist.all_reduce(pool, group=groups.world_group)
    log_ratio = log_ratios(reference, pool.cpu().numpy())
    blocks = inputs.folder / "blocks"
    with failing_together(groups):
        how = ScorePass(
            groups.rank,
            groups.world_size,
            groups.device,
            inputs.micro_batch_size,
            show_progress=inputs.show_progress,
            description=f"{inputs.description} dsir",
        )
        score_blocks(lambda ids: _log_weights(counter, source, ids, log_ratio), len(source), blocks, how)
    barrier(groups)
    if not groups.is_main:
        return Scores(None)
    weights = gather_scores(blocks, len(source))
    noise = np.random.Generator(np.random.PCG64(inputs.seed)).gumbel(size=len(weights))
    settings = {"method": "dsir", "buckets": options.buckets, "max_ngram": options.max_ngram, "noise": options.noise}
    return Scores((weights + noise * options.noise).astype(np.float32), settings)


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


def log_ratios(reference: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """log(p_j / q_j), float64 [buckets], of counts; ValueError where one of the two has no n-gram at all."""
    for name, counts in (("reference set", reference), ("shard", pool)):
        if not counts.sum():
            raise ValueError(f"found no n-gram in the {name}, expected text: check its tokens and its eod token")
    p, q = reference / reference.sum(), pool / pool.sum()
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


def _count(counter: NgramBuckets, source: UnitDataset, rank: int, world_size: int) -> np.ndarray:
    """int64 [buckets] over this rank's blocks of the shard."""
    total = np.zeros(counter.buckets, dtype=np.int64)
    for start in range(rank * BLOCK_UNITS, len(source), world_size * BLOCK_UNITS):
        total += counter.count(*_read(source, np.arange(start, min(start + BLOCK_UNITS, len(source)))))
    return total


def _count_reference(counter: NgramBuckets, reference) -> np.ndarray:
    """int64 [buckets] over the whole reference set: all its tokens, labelled or not."""
    total = np.zeros(counter.buckets, dtype=np.int64)
    for start in range(0, len(reference), BLOCK_UNITS):
        batch = reference.batch(np.arange(start, min(start + BLOCK_UNITS, len(reference))))
        real = np.arange(batch.tokens.shape[1])[None, :] < batch.lengths.numpy()[:, None]
        rows, columns = np.nonzero(real)
        total += counter.count(batch.tokens.numpy()[real], rows, columns)
    return total


def _log_weights(counter: NgramBuckets, source: UnitDataset, ids: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """float32 [n]: importance log-weights of units."""
    rows, buckets = counter.of(*_read(source, ids))
    return np.bincount(rows, weights=log_ratio[buckets], minlength=len(ids)).astype(np.float32)
