"""A random draw that favours the best units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config.bounds import bounded, check_bounds
from megatron_bliss.data.indexed import blocks
from megatron_bliss.selection.best import drawn, finite_scores
from megatron_bliss.selection.fraction import FractionSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Policy


@dataclass(frozen=True)
class GumbelSettings(FractionSettings):
    """How many units are drawn, and how strongly the best are favoured."""

    temperature: float = bounded(1.0, above=0)
    """Units are drawn with probability proportional to exp(score / temperature), without replacement."""


def keep(scores: np.ndarray, settings: GumbelSettings, *, seed: int) -> np.ndarray:
    """A random subset that favours high scores: the top fraction of score / temperature + Gumbel noise.

    The same as drawing units one after another, without replacement, each with probability proportional to
    exp(score / temperature). Towards temperature 0 it is the top fraction, towards infinity a uniform draw.
    """
    check_bounds(settings, "selection")
    scores = finite_scores(scores)
    return drawn(scores, settings.temperature, fraction_count(settings, len(scores)), np.random.default_rng(seed))


def effective_share(scores: np.ndarray, settings: GumbelSettings) -> float:
    """Effective sample size as a share of the n units: (sum of w)^2 / (n * sum of w^2), w = exp(score / temperature).

    Kish's measure of unequal weights: 1 where all units are as likely as each other, 1 / n where one has all weight.
    Far below the fraction that is kept, the units that have weight are kept whatever is drawn. Weights are taken
    relative to the largest, so that none overflows.
    """
    highest, total, squares = float(scores.max()), 0.0, 0.0
    for part in blocks(len(scores)):
        weights = np.exp((scores[part].astype(np.float64) - highest) / settings.temperature)
        total, squares = total + float(weights.sum()), squares + float(weights @ weights)
    return total**2 / (len(scores) * squares)


def describe(record: dict) -> str:
    """What the temperature comes to."""
    share, temperature = record["effective_sample_share"], record["temperature"]
    return f"gumbel, temperature {temperature:g}: the effective sample size is {share:.2%} of the units to choose from"


POLICY = Policy(
    help="a random draw that favours the best",
    settings=GumbelSettings,
    keep=keep,
    label=lambda settings: f"gumbel{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    required=("fraction",),
    share=fraction_share,
    measure=lambda scores, settings: {"effective_sample_share": effective_share(scores, settings)},
    describe=describe,
)
