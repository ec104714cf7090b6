"""The best units of each domain."""

from __future__ import annotations

import numpy as np

from megatron_bliss.selection.best import best_of_groups, finite_scores
from megatron_bliss.selection.fraction import DomainSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Domains, Policy


def keep(scores: np.ndarray, settings: DomainSettings, *, seed: int, domains: Domains) -> np.ndarray:
    """The top fraction of every domain, so that the selection has the corpus's mixture.

    Sizes are rounded such that ``round(fraction * n)`` units are kept.
    """
    scores = finite_scores(scores)
    sizes, total = np.bincount(domains.numbers), fraction_count(settings, len(scores))
    exact = sizes * (total / len(scores))
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return best_of_groups(scores, domains.numbers, counts, np.random.default_rng(seed))


POLICY = Policy(
    help="the best of each domain",
    settings=DomainSettings,
    keep=keep,
    label=lambda settings: f"proportional{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    needs=("domains",),
    required=("fraction",),
    share=fraction_share,
)
