"""The best units of all."""

from __future__ import annotations

import numpy as np

from megatron_bliss.selection.best import best, finite_scores
from megatron_bliss.selection.fraction import FractionSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Policy


def keep(scores: np.ndarray, settings: FractionSettings, *, seed: int) -> np.ndarray:
    """Units with the highest scores, ``round(fraction * n)`` of them (at least one); equal scores are drawn by seed."""
    scores = finite_scores(scores)
    return best(scores, fraction_count(settings, len(scores)), np.random.default_rng(seed))


POLICY = Policy(
    help="the best units",
    settings=FractionSettings,
    keep=keep,
    label=lambda settings: f"top{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    required=("fraction",),
    share=fraction_share,
    lowest_score_as="threshold",
)
