"""Tables of n-grams that a score model starts with: what counts alone can say of the guide and the shard.

A table has one number a bucket, and a unit's score is the mean over its n-grams, as in models/score.py. Numbers are
shifted and scaled such that the scores of the counted units have mean 0 and the deviation asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_bliss.arms.ngrams import SMOOTHING, blended, count_reference, ngrams_of, require_ngrams
from megatron_bliss.base.parallel import Groups, failing_together
from megatron_bliss.bilevel.count_proxy import Occurrences, solve_counts
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.data.batches import BatchSource, UnitDataset
from megatron_bliss.data.ngrams import NgramBuckets
from megatron_bliss.models.score import NgramTable
from megatron_bliss.selection.score_pass import BLOCK_UNITS

COUNTED_TOKENS = 2**23
"""Tokens of a shard that are counted at most, in blocks of units from all over it: 64 for each bucket of 2^17."""
Table = tuple[np.ndarray, list[str]]
"""One number a bucket, float64 [m], and what is to be warned of."""
STEPS, TOLERANCE = 100, 1e-4
"""Frank-Wolfe steps at most, and nats per n-gram above the minimum that are near enough."""


def importance_table(config: ScoreConfig, found: Occurrences, guide: np.ndarray, share: float) -> Table:
    """log p_j - log q_j, float64 [m]: p of the guide, smoothed, q of the shard (arXiv 2302.03169)."""
    pool = found.total()
    p = blended(guide, pool, config.count_smoothing)
    return np.log(p + SMOOTHING) - np.log(pool / pool.sum() + SMOOTHING), []


def matching_table(config: ScoreConfig, found: Occurrences, guide: np.ndarray, share: float) -> Table:
    """p_j / q_j, float64 [m]: q of the best selection of ``share`` of the shard (bilevel/count_proxy.py)."""
    p = blended(guide, found.total(), config.count_smoothing)
    solution = solve_counts(found, p, share, prior=config.count_prior, steps=STEPS, tolerance=TOLERANCE)
    if share == 1 or solution.kept_loss < solution.control_loss:
        return solution.ratios, []
    return solution.ratios, [
        f"the best {share:.0%} by counts suit the guide no better than a random choice ({solution.kept_loss:.4f} "
        f"against {solution.control_loss:.4f} nats per n-gram): guide or shard are small beside the table, or "
        "smoothing hides the guide; lower score.count_smoothing or score.ngram_buckets, give a larger guide, or take "
        "score.init_from importance"
    ]


TABLES: dict[str, Callable[[ScoreConfig, Occurrences, np.ndarray, float], Table]] = {
    "importance": importance_table,
    "counts": matching_table,
}
"""score.init_from -> (section score, n-grams of units, the guide's counts [m], share to be kept) -> table."""


def fill_table(
    table: NgramTable,
    config: ScoreConfig,
    source: UnitDataset,
    reference: BatchSource,
    share: float,
    groups: Groups,
) -> list[str]:
    """Start ``table`` as ``config.init_from`` says; returns warnings, on the main rank.

    Collective: the main rank counts, all get the same numbers.
    """
    warnings: list[str] = []
    with failing_together(groups):
        if groups.is_main:
            counter = NgramBuckets(table.arch.buckets, table.arch.max_ngram, table.eod)
            ids = counted_units(source)
            found = Occurrences(*ngrams_of(counter, source, ids), len(ids), counter.buckets)
            guide = count_reference(counter, reference)
            _require_common(guide, found.total())
            numbers, warnings = TABLES[config.init_from](config, found, guide, share)
            numbers = scaled(numbers, found, config.start_deviation)
            start = torch.from_numpy(numbers / table.arch.scale).unsqueeze(1)
            with torch.no_grad():
                table.table.copy_(start)
    dist.broadcast(table.table.data, src=0, group=groups.world_group)
    return warnings


def _require_common(guide: np.ndarray, pool: np.ndarray) -> None:
    """ValueError where guide and shard, counts [m] each, share no n-gram: no score could tell units apart."""
    require_ngrams(guide, pool)
    if not guide[pool > 0].any():
        raise ValueError(
            "found no n-gram that the guide and the shard have in common, expected some: check that both are text of "
            "one kind, made by one tokenizer"
        )


def counted_units(source: UnitDataset) -> np.ndarray:
    """Units whose n-grams are counted, increasing: all, or blocks at even distances with COUNTED_TOKENS tokens."""
    lengths = np.minimum(source.corpus.lengths, source.seq_length).astype(np.int64)
    starts = np.arange(0, len(lengths), BLOCK_UNITS)
    per_block = np.add.reduceat(lengths, starts)
    blocks = np.arange(len(starts))
    if per_block.sum() > COUNTED_TOKENS:
        many = max(1, int(COUNTED_TOKENS / per_block.mean()))
        blocks = np.unique(np.linspace(0, len(starts) - 1, many).astype(np.int64))
    return np.concatenate([np.arange(start, min(start + BLOCK_UNITS, len(lengths))) for start in starts[blocks]])


def scaled(numbers: np.ndarray, found: Occurrences, deviation: float) -> np.ndarray:
    """The numbers [m] shifted and multiplied so that units' means have mean 0 and the standard deviation asked for."""
    sizes = found.sizes
    scores = (found.sums(numbers) / np.maximum(sizes, 1))[sizes > 0]
    spread = scores.std()
    if not spread > 0:
        raise ValueError(
            "found the same score for all units of the shard, expected different ones: its units have the same n-grams"
        )
    return (numbers - scores.mean()) * (deviation / spread)
