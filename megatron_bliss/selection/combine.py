"""Several selections or scores of the same units as one: every way that ``--combine`` of ``subset_index.py`` knows.

Ranks of several files add up block by block, so that beside the scores themselves there are 8 bytes per unit for the
result and a sorted copy of one file at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bliss.data.indexed import blocks
from megatron_bliss.selection.best import finite_scores, twice_ranks

Weights = Sequence[float] | None


@dataclass(frozen=True)
class Combination:
    """One way to combine score files: either what each of them selects, or the scores, by which is then selected."""

    help: str
    """What it keeps, in a few words."""
    selections: Callable[[Sequence[np.ndarray], int], np.ndarray] | None = None
    """``selections(parts, num_units)``: numbers int64[k], increasing, of the units that each file selects."""
    scores: Callable[[Sequence[np.ndarray], Weights], np.ndarray] | None = None
    """``scores(parts, weights)``: float[n] of several float[n]; ValueError for scores that are not finite."""
    weighted: bool = False
    """Whether ``scores`` takes one weight per file."""


def union(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Units that any of the selections holds."""
    return np.flatnonzero(_votes(selections, num_units) > 0)


def intersection(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Units that all of the selections hold."""
    return np.flatnonzero(_votes(selections, num_units) == len(selections))


def mean_score(scores: Sequence[np.ndarray], weights: Weights = None) -> np.ndarray:
    """Weighted mean float32[n] of several scores of the same units, each standardised (mean 0, deviation 1) first."""
    weights = _checked(weights, len(scores))
    total = np.zeros(len(scores[0]), dtype=np.float32)
    for one, weight in zip(scores, weights, strict=True):
        centre, deviation = finite_scores(one).mean(dtype=np.float64), one.std(dtype=np.float64)
        scale = weight / (sum(map(abs, weights)) * (deviation or 1.0))
        for part in blocks(len(total)):
            total[part] += ((one[part].astype(np.float64) - centre) * scale).astype(np.float32)
    return total


def mean_rank(scores: Sequence[np.ndarray], weights: Weights = None) -> np.ndarray:
    """Weighted mean float64[n] of a unit's ranks, from 0 (worst) to 1 (best); a lone unit has rank 1."""
    shares = _shares(weights, len(scores))
    total = np.zeros(len(scores[0]))
    for one, share in zip(scores, shares, strict=True):
        for part, twice in twice_ranks(finite_scores(one)):
            total[part] += share * _from_zero(twice, len(one))
    return total


def rank_product(scores: Sequence[np.ndarray], weights: Weights = None) -> np.ndarray:
    """Weighted geometric mean float64[n] of a unit's ranks, from 1 / n (worst) to 1: one bad rank spoils it."""
    shares = _shares(weights, len(scores))
    total = np.zeros(len(scores[0]))
    for one, share in zip(scores, shares, strict=True):
        for part, twice in twice_ranks(finite_scores(one)):
            total[part] += share * np.log((twice + 2) / (2 * len(one)))
    return np.exp(total, out=total)


def least_rank(scores: Sequence[np.ndarray], weights: Weights = None) -> np.ndarray:
    """The smallest float64[n] of a unit's ranks, from 0 (worst) to 1 (best). Takes no weights."""
    assert weights is None
    total = np.ones(len(scores[0]))
    for one in scores:
        for part, twice in twice_ranks(finite_scores(one)):
            np.minimum(total[part], _from_zero(twice, len(one)), out=total[part])
    return total


COMBINATIONS = {
    "union": Combination("units that any file selects", selections=union),
    "intersection": Combination("units that all files select", selections=intersection),
    "mean": Combination("select by the mean score, each file's standardised first", scores=mean_score, weighted=True),
    "ranks": Combination("select by the mean rank", scores=mean_rank, weighted=True),
    "product": Combination(
        "select by the geometric mean of ranks, which is low where one rank is", scores=rank_product, weighted=True
    ),
    "minimum": Combination("select by the worst of a unit's ranks", scores=least_rank),
}


def check_combination(name: str | None, files: int, weights: Weights) -> None:
    """ValueError where so many score files cannot be combined by this name (None: not at all) and these weights."""
    if files > 1 and name is None:
        raise ValueError(f"found {files} score files, expected --combine {', '.join(COMBINATIONS)}")
    if weights is not None and (name is None or not COMBINATIONS[name].weighted):
        takers = ", ".join(key for key, one in COMBINATIONS.items() if one.weighted)
        raise ValueError(f"found --weights without --combine {takers}, expected both or none: change one of them")


def _from_zero(twice: np.ndarray, count: int) -> np.ndarray:
    """Ranks in [0, 1] of twice the ranks in 0 to count - 1."""
    return twice / (2 * (count - 1)) if count > 1 else np.ones(len(twice))


def _checked(weights: Weights, files: int) -> list[float]:
    """One finite weight per file, not all 0."""
    weights = [1.0] * files if weights is None else list(weights)
    if len(weights) != files or not np.isfinite(weights).all() or not any(weights):
        raise ValueError(
            f"found {len(weights)} weights {weights} for {files} score files, expected one finite number each, not all "
            "0: change --weights"
        )
    return weights


def _shares(weights: Weights, files: int) -> list[float]:
    """Weights of ranks, which sum to 1."""
    weights = _checked(weights, files)
    if min(weights) < 0:
        raise ValueError(f"found weights {weights} of ranks, expected none below 0: change --weights")
    largest = max(weights)
    whole = sum(weight / largest for weight in weights)  # so that no sum is too large
    return [weight / largest / whole for weight in weights]


def _votes(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    votes = np.zeros(num_units, dtype=np.uint8 if len(selections) < 256 else np.int32)
    for ids in selections:
        votes[ids] += 1
    return votes
