"""The best units with a share of random ones among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config.bounds import bounded
from megatron_bliss.selection.best import best, finite_scores
from megatron_bliss.selection.fraction import FractionSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Policy


@dataclass(frozen=True)
class MixedSettings(FractionSettings):
    """How many units are kept, and how many of them are drawn at random."""

    random_share: float = bounded(0.1, minimum=0, maximum=1)
    """Share of the units kept that is drawn uniformly from those that are not among the best."""


def keep(scores: np.ndarray, settings: MixedSettings, *, seed: int) -> np.ndarray:
    """``round(fraction * n)`` units: ``round(random_share * kept)`` of them are drawn, the others are the best.

    What is drawn comes from the units that are left when the best are taken out. Share 0: the top fraction.
    """
    scores, generator = finite_scores(scores), np.random.default_rng(seed)
    total = fraction_count(settings, len(scores))
    drawn, kept = round(settings.random_share * total), np.zeros(len(scores), dtype=bool)
    if drawn < total:
        kept[best(scores, total - drawn, generator)] = True
    kept[generator.choice(np.flatnonzero(~kept), drawn, replace=False)] = True
    return np.flatnonzero(kept)


POLICY = Policy(
    help="the best with random ones among them",
    settings=MixedSettings,
    keep=keep,
    label=lambda settings: f"mixed{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    required=("fraction",),
    share=fraction_share,
)
