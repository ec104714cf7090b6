"""From the score model to the units kept: the sections ``scoring`` and ``selection``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bliss.config.bounds import bounded
from megatron_bliss.config.platform import Precision


@dataclass(frozen=True)
class ScoringConfig:
    """One forward pass of the score model over a shard."""

    micro_batch_size: int = bounded(64, minimum=1)
    """Units per forward pass and rank."""
    params_dtype: Precision = "fp32"
    """Precision of the score model's trunk; the mean over tokens and the linear unit stay fp32."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which units of a scored shard the target trains on."""

    policy: Literal["top_fraction", "threshold", "token_budget", "gumbel", "proportional", "quotas"] = "top_fraction"
    """top_fraction: the best units; threshold: those above a score; token_budget: the best that fit; gumbel: a random
    draw that favours the best; proportional: the best of each domain; quotas: the best under a given mixture."""
    fraction: float = bounded(0.2, above=0, maximum=1)
    """Share of units kept (all policies but threshold and token_budget)."""
    threshold: float = bounded(0.0)
    """threshold: lowest score kept."""
    tokens: int = bounded(0, minimum=0)
    """token_budget: most tokens kept (0, in a run: as many as the target trains on in one round)."""
    temperature: float = bounded(1.0, above=0)
    """gumbel: units are drawn with probability proportional to exp(score / temperature), without replacement."""
    domain_field: str = "domain"
    """proportional, quotas: column of the provenance that says which domain a unit is of."""
    quotas: dict[str, float] = bounded(default_factory=dict, minimum=0, maximum=1)
    """quotas: share of the selection per domain; the best units of all domains not named fill what is left."""
    epoch_warning: float = bounded(4.0, above=0)
    """Warn when the target will see the tokens of a selection more often than this in one round."""
