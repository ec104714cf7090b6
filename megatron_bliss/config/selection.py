"""From the score model to the units kept: the sections ``scoring`` and ``selection``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    policy: str = "soft"
    """Which units are kept. soft gains less on the guide than top_fraction and loses less on other text."""
    epoch_warning: float = bounded(4.0, above=0)
    """Warn when the target will see the tokens of a selection more often than this in one round."""
    fraction_schedule: list[float] = bounded(default_factory=list, above=0, maximum=1)
    """In place of fraction: share of units kept in each round, such as [0.4,0.3,0.2,0.1] (empty: fraction in all)."""
    near_duplicates: float = bounded(0.0, minimum=0, maximum=1)
    """Of units that share at least this part of their token 5-grams (Jaccard similarity, estimated by MinHash) only the
    best-scored can be kept, and the next best fill up (0: off)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the policies (selection/policies/), those not chosen among them: selection.fraction and others."""
