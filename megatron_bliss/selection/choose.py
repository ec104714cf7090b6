"""From scores and settings to kept units: brings a policy what it needs to know of the corpus beside its scores."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property

import numpy as np

from megatron_bliss.config.config import SelectionConfig
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.provenance import provenance_codes
from megatron_bliss.selection.policies import POLICIES


class Units:
    """What policies ask about the units of a corpus, read when it is asked for; ``kept``: only these units."""

    def __init__(self, prefix: str | os.PathLike, field: str, kept: np.ndarray | None = None) -> None:
        self._prefix, self._field, self._kept = prefix, field, kept

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32[n] tokens."""
        lengths = IndexedCorpus(self._prefix).lengths
        return lengths.copy() if self._kept is None else lengths[self._kept]

    @cached_property
    def domains(self) -> tuple[np.ndarray, list[str]]:
        """(int[n] numbers of domains, their names)."""
        codes, names = provenance_codes(self._prefix, self._field)
        return codes if self._kept is None else codes[self._kept], names


ARGUMENTS: dict[str, Callable[[SelectionConfig, Units], dict]] = {
    "top_fraction": lambda settings, units: {"fraction": settings.fraction},
    "threshold": lambda settings, units: {"threshold": settings.threshold},
    "token_budget": lambda settings, units: {"tokens": settings.tokens, "lengths": units.lengths},
    "gumbel": lambda settings, units: {"fraction": settings.fraction, "temperature": settings.temperature},
    "proportional": lambda settings, units: {"fraction": settings.fraction, "groups": units.domains[0]},
    "quotas": lambda settings, units: {
        "fraction": settings.fraction,
        "shares": settings.quotas,
        "groups": units.domains[0],
        "names": units.domains[1],
    },
}
"""Policy -> its arguments beside scores and seed."""
LABELS: dict[str, Callable[[SelectionConfig], str]] = {
    "top_fraction": lambda settings: f"top{settings.fraction * 100:g}",
    "threshold": lambda settings: f"min{settings.threshold:g}",
    "token_budget": lambda settings: f"tokens{settings.tokens}",
    "gumbel": lambda settings: f"gumbel{settings.fraction * 100:g}",
    "proportional": lambda settings: f"proportional{settings.fraction * 100:g}",
    "quotas": lambda settings: f"quotas{settings.fraction * 100:g}",
}
"""Policy -> a short word for the subset's name."""
NOT_RECORDED = ("lengths", "groups", "names")
"""Arguments that say what the corpus is, not what was chosen."""


def choose_units(
    prefix: str | os.PathLike,
    scores: np.ndarray,
    settings: SelectionConfig,
    *,
    seed: int,
    excluded: np.ndarray | None = None,
) -> tuple[np.ndarray, dict, str]:
    """Units of a scored corpus that the policy keeps: (ids int64[k] increasing, policy for the manifest, label).

    scores: float[n], one per unit. excluded: unit numbers that are taken out first; a fraction is then one of the rest.
    The policy's record has its settings, the seed and the lowest score kept. Raises ValueError when nothing is kept.
    """
    remaining = None if excluded is None else _without(excluded, len(scores), prefix)
    if remaining is not None:
        scores = scores[remaining]
    units = Units(prefix, settings.domain_field, remaining)
    arguments = ARGUMENTS[settings.policy](settings, units)
    ids = POLICIES[settings.policy](scores, seed=seed, **arguments)
    if not len(ids):
        raise ValueError(
            f"policy {settings.policy} keeps no unit of {prefix}, whose scores go from {scores.min():g} to "
            f"{scores.max():g}, expected at least one: change selection.{settings.policy}"
        )
    recorded = {name: value for name, value in arguments.items() if name not in NOT_RECORDED}
    lowest = {"threshold" if settings.policy == "top_fraction" else "lowest_score_kept": float(scores[ids].min())}
    policy = {"name": settings.policy, **recorded, "seed": seed, **lowest}
    label = LABELS[settings.policy](settings).replace(".", "p")
    return (ids if remaining is None else remaining[ids]), policy, label


def check_selection(settings: SelectionConfig) -> None:
    """Refuse settings that cannot work whatever the corpus; errors name the option."""
    if not 0 < settings.fraction <= 1:
        raise ValueError(f"found selection.fraction {settings.fraction}, expected a share in (0, 1]")
    if not settings.temperature > 0:
        raise ValueError(f"found selection.temperature {settings.temperature}, expected more than 0")
    if settings.tokens < 0:
        raise ValueError(f"found selection.tokens {settings.tokens}, expected 0 or more")
    if not settings.epoch_warning > 0:
        raise ValueError(f"found selection.epoch_warning {settings.epoch_warning}, expected more than 0")
    shares = settings.quotas.values()
    if (settings.policy == "quotas") != bool(settings.quotas):
        raise ValueError(
            f"found selection.policy {settings.policy} and selection.quotas {settings.quotas}, expected quotas with "
            "the policy quotas and with no other: change one of them"
        )
    if settings.quotas and (min(shares) < 0 or sum(shares) > 1 + 1e-9):
        raise ValueError(f"found selection.quotas {settings.quotas}, expected shares that sum to at most 1")


def repetition_warnings(train_tokens: int, selected_tokens: int, limit: float) -> list[str]:
    """A line for the user when training repeats a selection more than ``limit`` times; [] otherwise.

    Repeating data up to about four times costs little, after that it is worth less and less (arXiv 2305.16264).
    """
    epochs = train_tokens / selected_tokens
    if epochs <= limit:
        return []
    return [
        f"the target will train on {train_tokens:,} tokens of a selection that has {selected_tokens:,}: {epochs:.1f} "
        f"epochs, more than selection.epoch_warning={limit:g}; raise selection.fraction, lower "
        "pretraining.train_iters, or prepare more data"
    ]


def _without(excluded: np.ndarray, count: int, prefix: str | os.PathLike) -> np.ndarray:
    """int64: the numbers of the units that are not excluded."""
    excluded = np.asarray(excluded, dtype=np.int64)
    if len(excluded) and not (excluded.min() >= 0 and excluded.max() < count):
        raise ValueError(f"excluded units {excluded.min()} to {excluded.max()}, but {prefix} has 0 to {count - 1}")
    kept = np.ones(count, dtype=bool)
    kept[excluded] = False
    if not kept.any():
        raise ValueError(f"all {count} units of {prefix} are excluded, expected some to choose from: change --exclude")
    return np.flatnonzero(kept)
