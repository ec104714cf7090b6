"""The best units, of which every named domain has at least a given share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config.bounds import bounded
from megatron_bliss.selection.best import best, best_of_groups, finite_scores
from megatron_bliss.selection.fraction import DomainSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Domains, Policy

ROUNDING = 1e-9
"""What a product such as 0.29 * 100 may fall short of its whole number."""


@dataclass(frozen=True)
class FloorSettings(DomainSettings):
    """How many units are kept, and how many of each domain at least."""

    floors: dict[str, float] = bounded(default_factory=dict, minimum=0, maximum=1)
    """Least share of the selection per domain; the best units of all domains fill what is left."""


def keep(scores: np.ndarray, settings: FloorSettings, *, seed: int, domains: Domains) -> np.ndarray:
    """``round(fraction * n)`` units with the highest sum of scores of which domain g has at least ``floors[g]``.

    A floor is rounded down to whole units: so many of the domain's best are kept. The best of all that are then left
    fill up. Raises ValueError for an unknown domain and one that has too few units.
    """
    check(settings)
    scores, generator, names = finite_scores(scores), np.random.default_rng(seed), domains.names
    unknown = [name for name in settings.floors if name not in names]
    if unknown:
        raise ValueError(
            f"floors for {', '.join(map(repr, unknown))}, expected some of {', '.join(map(repr, names))}: "
            "change selection.floors"
        )
    total = fraction_count(settings, len(scores))
    counts = np.array([int(settings.floors.get(name, 0.0) * total + ROUNDING) for name in names])
    sizes = np.bincount(domains.numbers, minlength=len(names))
    for name, count, size in zip(names, counts.tolist(), sizes.tolist(), strict=True):
        if count > size:
            raise ValueError(
                f"{size} units of {name}, but its floor takes {count}: lower its share in selection.floors, or "
                "selection.fraction"
            )
    kept = np.zeros(len(scores), dtype=bool)
    kept[best_of_groups(scores, domains.numbers, counts, generator)] = True
    left, missing = np.flatnonzero(~kept), total - int(counts.sum())
    if missing > 0:
        kept[left[best(scores[left], missing, generator)]] = True
    return np.flatnonzero(kept)


def check(settings: FloorSettings, chosen: bool = True) -> None:
    """Refuse floors that are missing, that another policy would not look at, or that are more than the whole."""
    if chosen != bool(settings.floors):
        raise ValueError(
            f"found selection.floors {settings.floors} {'with' if chosen else 'without'} selection.policy floors, "
            "expected floors with the policy floors and with no other: change one of them"
        )
    if sum(settings.floors.values()) > 1 + ROUNDING:
        raise ValueError(f"found selection.floors {settings.floors}, expected shares that sum to at most 1")


POLICY = Policy(
    help="the best with a least share of given domains",
    settings=FloorSettings,
    keep=keep,
    label=lambda settings: f"floors{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    needs=("domains",),
    required=("fraction", "floors"),
    check=check,
    share=fraction_share,
)
