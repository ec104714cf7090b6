"""Several selections or scores of the same units as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_bliss.data.indexed import blocks
from megatron_bliss.selection.best import finite_scores


def union(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Units that any of the selections holds."""
    return np.flatnonzero(_votes(selections, num_units) > 0)


def intersection(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Units that all of the selections hold."""
    return np.flatnonzero(_votes(selections, num_units) == len(selections))


COMBINATIONS = {"union": union, "intersection": intersection}


def mean_score(scores: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean float32[n] of several scores of the same units, each standardised (mean 0, deviation 1) first."""
    weights = [1.0] * len(scores) if weights is None else list(weights)
    if len(weights) != len(scores) or not sum(map(abs, weights)) > 0:
        raise ValueError(
            f"{len(weights)} weights {weights} for {len(scores)} score files, expected one each: --weights"
        )
    total = np.zeros(len(scores[0]), dtype=np.float32)
    for one, weight in zip(scores, weights, strict=True):
        centre, deviation = finite_scores(one).mean(dtype=np.float64), one.std(dtype=np.float64)
        scale = weight / (sum(map(abs, weights)) * (deviation or 1.0))
        for part in blocks(len(total)):
            total[part] += ((one[part].astype(np.float64) - centre) * scale).astype(np.float32)
    return total


def _votes(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    votes = np.zeros(num_units, dtype=np.uint8)
    for ids in selections:
        votes[ids] += 1
    return votes
