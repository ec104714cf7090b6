"""Settings of the policies that keep a fraction of the units, and what follows from a fraction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_bliss.config.bounds import bounded, check_bounds


@dataclass(frozen=True)
class FractionSettings:
    """How many units are kept."""

    fraction: float = bounded(0.2, above=0, maximum=1)
    """Share of units kept."""


@dataclass(frozen=True)
class DomainSettings(FractionSettings):
    """How many units are kept, and what a domain is."""

    domain_field: str = "domain"
    """Column of the provenance that says which domain a unit is of."""


def fraction_share(settings: FractionSettings, tokens: float) -> float:
    """About the share of tokens kept."""
    return settings.fraction


def fraction_count(settings: FractionSettings, count: int) -> int:
    """How many of ``count`` units are kept: at least one."""
    check_bounds(settings, "selection")
    return max(1, round(settings.fraction * count))


def as_many_of(settings: Any, before: int, left: int) -> Any:
    """Settings that keep as many of ``left`` units as ``settings`` of ``before``; those without a fraction stay."""
    if not isinstance(settings, FractionSettings):
        return settings
    return replace(settings, fraction=min(1.0, fraction_count(settings, before) / left))
