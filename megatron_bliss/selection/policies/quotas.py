"""The best units under a given mixture of domains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bliss.config.bounds import bounded
from megatron_bliss.selection.best import best_of_groups, finite_scores
from megatron_bliss.selection.fraction import DomainSettings, fraction_count, fraction_share
from megatron_bliss.selection.policy import Domains, Policy


@dataclass(frozen=True)
class QuotaSettings(DomainSettings):
    """How many units are kept, and how many of each domain."""

    quotas: dict[str, float] = bounded(default_factory=dict, minimum=0, maximum=1)
    """Share of the selection per domain; the best units of all domains not named fill what is left."""


def keep(scores: np.ndarray, settings: QuotaSettings, *, seed: int, domains: Domains) -> np.ndarray:
    """``round(fraction * n)`` units, of which domain g makes up ``quotas[g]``: the best units of each domain.

    Where the quotas do not sum to 1, the best units of all domains that are not named fill what is left. Raises
    ValueError for an unknown domain and one that has too few units.
    """
    check(settings)
    scores, names = finite_scores(scores), domains.names
    unknown = [name for name in settings.quotas if name not in names]
    if unknown:
        raise ValueError(
            f"quotas for {', '.join(map(repr, unknown))}, expected some of {', '.join(map(repr, names))}: "
            "change selection.quotas"
        )
    total = fraction_count(settings, len(scores))
    wanted = {name: round(share * total) for name, share in settings.quotas.items()}
    rest = len(names)  # domains without a quota compete as one
    merged = np.array([number if name in wanted else rest for number, name in enumerate(names)])[domains.numbers]
    counts = np.array([*(wanted.get(name, 0) for name in names), max(0, total - sum(wanted.values()))])
    sizes = np.bincount(merged, minlength=rest + 1)
    for name, count, size in zip([*names, "all other domains together"], counts.tolist(), sizes.tolist(), strict=True):
        if count > size:
            raise ValueError(
                f"{size} units of {name}, but the quota takes {count}: lower its share in selection.quotas, or "
                "selection.fraction"
            )
    return best_of_groups(scores, merged, counts, np.random.default_rng(seed))


def check(settings: QuotaSettings, chosen: bool = True) -> None:
    """Refuse quotas that are missing, that another policy would not look at, or that are more than the whole."""
    if chosen != bool(settings.quotas):
        raise ValueError(
            f"found selection.quotas {settings.quotas} {'with' if chosen else 'without'} selection.policy quotas, "
            "expected quotas with the policy quotas and with no other: change one of them"
        )
    if sum(settings.quotas.values()) > 1 + 1e-9:
        raise ValueError(f"found selection.quotas {settings.quotas}, expected shares that sum to at most 1")


POLICY = Policy(
    help="the best under a given mixture",
    settings=QuotaSettings,
    keep=keep,
    label=lambda settings: f"quotas{settings.fraction * 100:g}",
    to_keep_more="raise selection.fraction",
    needs=("domains",),
    required=("fraction", "quotas"),
    check=check,
    share=fraction_share,
)
