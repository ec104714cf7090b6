"""Options of the selection methods that runs compare with: the section ``baselines`` of config.py."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DsirConfig:
    """The arm dsir: importance resampling on hashed n-grams (arXiv 2302.03169), of tokens."""

    buckets: int = 10_000
    """m, buckets that n-grams are hashed into."""
    max_ngram: int = 2
    """Longest n-gram counted, in tokens; all shorter ones are, too."""
    noise: float = 1.0
    """Scale of the Gumbel noise on the log-weights: 1 samples units by weight, 0 takes the heaviest."""


@dataclass(frozen=True)
class BaselinesConfig:
    """Options of selection methods that runs compare with, each an arm of its own."""

    dsir: DsirConfig = field(default_factory=DsirConfig)
