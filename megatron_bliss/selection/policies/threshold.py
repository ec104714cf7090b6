"""All units above a score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config.bounds import bounded
from megatron_bliss.selection.best import finite_scores
from megatron_bliss.selection.policy import Policy


@dataclass(frozen=True)
class ThresholdSettings:
    """What is good enough."""

    threshold: float = bounded(0.0)
    """Lowest score kept."""


def keep(scores: np.ndarray, settings: ThresholdSettings, *, seed: int) -> np.ndarray:
    """Units that score at least ``threshold``; nothing is drawn."""
    return np.flatnonzero(finite_scores(scores) >= settings.threshold)


POLICY = Policy(
    help="those above a score",
    settings=ThresholdSettings,
    keep=keep,
    label=lambda settings: f"min{settings.threshold:g}",
    to_keep_more="lower selection.threshold",
    required=("threshold",),
)
