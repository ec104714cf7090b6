"""A random draw by rank: the better a unit's rank, the likelier it is kept, and none is sure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config.bounds import bounded, check_bounds
from megatron_bliss.selection.best import drawn, finite_scores, twice_ranks
from megatron_bliss.selection.fraction import FractionSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Policy

_LOG_ODDS = np.linspace(-40.0, 40.0, 20_001)
"""Where ``best_share`` cuts the ranks of endlessly many units, as log(r / (1 - r)): down to parts of 1e-17."""


@dataclass(frozen=True)
class SoftSettings(FractionSettings):
    """How many units are kept, and how strongly the best are favoured."""

    softness: float = bounded(2.0, above=0)
    """Units are drawn, without replacement, with probability proportional to (r / (1 - r)) ** (1 / softness), r the
    unit's rank from 0 (worst) to 1: only the order of scores counts, so that every arm is softened alike."""


def log_odds_of_ranks(scores: np.ndarray) -> np.ndarray:
    """log(r / (1 - r)), float32[n], of r = (units below + half of those that are equal) / n, of finite float[n]."""
    n = len(scores)
    found = np.empty(n, dtype=np.float32)
    for part, ranks in twice_ranks(scores):
        twice = ranks.astype(np.float64) + 1  # 2 n r, at least 1 and at most 2 n - 1
        found[part] = np.log(twice / (2 * n - twice))
    return found


def keep(scores: np.ndarray, settings: SoftSettings, *, seed: int) -> np.ndarray:
    """The top fraction of log-odds / softness + Gumbel noise.

    The same as drawing units one after another, without replacement, each with probability proportional to its odds to
    the power 1 / softness. Towards softness 0 it is the top fraction, towards infinity a uniform draw.
    """
    check_bounds(settings, "selection")
    log_odds = log_odds_of_ranks(finite_scores(scores))
    count = fraction_count(settings, len(log_odds))
    return drawn(log_odds, settings.softness, count, np.random.default_rng(seed))


def best_share(settings: SoftSettings) -> float:
    """Share of the kept that is expected to be among as many best units, of very many units with unlike scores.

    Drawn so, a unit with weight w is kept with probability 1 - exp(-t w), t such that the fraction is kept in all.
    """
    fraction, middles = settings.fraction, (_LOG_ODDS[1:] + _LOG_ODDS[:-1]) / 2
    shares = -np.diff(1 / (1 + np.exp(_LOG_ODDS)))  # of the units, between two ranks: from the end that is precise
    high = 2 * _LOG_ODDS[-1] / settings.softness + 50
    low = -high
    for _ in range(200):  # log t by bisection
        log_t = (low + high) / 2
        kept = -np.expm1(-np.exp(np.minimum(middles / settings.softness + log_t, 50.0))) * shares
        low, high = (log_t, high) if kept.sum() < fraction else (low, log_t)
    return float(min(1.0, kept[np.cumsum(shares[::-1])[::-1] <= fraction].sum() / fraction))


def describe(record: dict) -> str:
    """What the softness comes to."""
    share, softness, fraction = record["best_share"], record["softness"], record["fraction"]
    return (
        f"soft, softness {softness:g}: about {100 * share:.3g}% of the kept are among the best {100 * fraction:g}%, "
        "where scores differ"
    )


def why(settings: SoftSettings) -> str:
    """What it costs and saves; nothing where all units are kept."""
    if settings.fraction == 1:
        return ""
    return (
        f"about {100 * best_share(settings):.3g}% of the kept are among the best {100 * settings.fraction:g}%, which "
        "gains less on the guide than to keep the best alone, and loses less on other text"
    )


POLICY = Policy(
    help="a random draw by rank: the better, the likelier",
    settings=SoftSettings,
    keep=keep,
    label=lambda settings: f"soft{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    required=("fraction",),
    share=fraction_share,
    measure=lambda scores, settings: {"best_share": best_share(settings)},
    why=why,
    describe=describe,
)
