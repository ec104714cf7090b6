"""The best units by score: what selection policies share.

Scores are never sorted as a whole: the time is that of a few passes over them, the memory a few bytes per unit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_bliss.data.indexed import blocks

RANK_BLOCK = 1 << 20
"""Units whose ranks are looked up at once."""


def finite_scores(scores: np.ndarray) -> np.ndarray:
    """float[n], one finite number per unit; ValueError for anything else."""
    scores = np.asarray(scores)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores have shape {list(scores.shape)}, expected one number per unit")
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise ValueError(
            f"{len(bad)} of {len(scores)} scores are not finite (unit {bad[0]}: {scores[bad[0]]}), expected numbers: "
            "score the shard again"
        )
    return scores


def twice_ranks(scores: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Twice the rank of every unit, 0 (worst) to 2 (n - 1), in blocks of int64; equal scores share the mean of theirs.

    Memory: a sorted copy of the finite float[n] scores.
    """
    ordered = np.sort(scores)
    for part in blocks(len(scores), RANK_BLOCK):
        order = np.argsort(scores[part])  # what is looked up in order is found several times faster
        wanted = scores[part][order]
        twice = np.empty(len(order), dtype=np.int64)
        below = np.searchsorted(ordered, wanted, side="left")
        twice[order] = below + np.searchsorted(ordered, wanted, side="right") - 1
        yield part, twice


def best(keys: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """int64[count]: places of the largest keys, increasing; the generator draws among equal ones at the threshold."""
    place = len(keys) - count
    threshold = np.partition(keys, place)[place]
    kept = keys > threshold
    equal = np.flatnonzero(keys == threshold)
    kept[generator.choice(equal, count - np.count_nonzero(kept), replace=False)] = True
    return np.flatnonzero(kept)


def drawn(logits: np.ndarray, temperature: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """int64[count]: places, increasing, drawn without replacement in proportion to exp(logit / temperature).

    The largest of logit / temperature + Gumbel noise. Towards temperature 0 they are the best, towards infinity all are
    as likely.
    """
    keys = np.empty(len(logits), dtype=np.float32)
    stretch, spread = max(temperature, 1.0), min(temperature, 1.0)  # so that neither term overflows or vanishes
    for part in blocks(len(logits)):
        noise = generator.gumbel(size=part.stop - part.start)
        keys[part] = logits[part].astype(np.float64) / stretch + spread * noise
    return best(keys, count, generator)


def best_of_groups(
    scores: np.ndarray, groups: np.ndarray, counts: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The ``counts[g]`` best units of every group g. groups: int[n], a number from 0 on per unit."""
    members = np.argsort(groups.astype(np.uint16) if len(counts) < 1 << 16 else groups, kind="stable")  # 16 bits: radix
    ends = np.cumsum(np.bincount(groups, minlength=len(counts)))
    kept = np.zeros(len(scores), dtype=bool)
    for first, last, count in zip([0, *ends.tolist()], ends.tolist(), counts.tolist(), strict=False):
        if count:
            kept[members[first:last][best(scores[members[first:last]], count, generator)]] = True
    return np.flatnonzero(kept)
