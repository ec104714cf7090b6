"""Units in a few groups: one for each of the most frequent values of a provenance column, and one for the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bliss.data.provenance import provenance_codes

MOST_GROUPS = 24
"""Values that have a group of their own: those of hundreds of rare ones would be noise, and long lines of a log."""
REST = "other"
"""The group of all other values, and of a value of this name."""


@dataclass(frozen=True)
class UnitGroups:
    """Which group each unit is of."""

    names: tuple[str, ...]
    """Of the groups."""
    codes: np.ndarray
    """int8 [units], places in ``names``: a byte a unit."""


def group_units(prefix: str | os.PathLike, field: str, frequent: Sequence[str]) -> UnitGroups:
    """The units of a corpus or subset by its provenance column ``field``.

    frequent: values, the most frequent first; the first ``MOST_GROUPS`` of them have groups of their own, whether or
        not a unit has them. Units without a value count as the value "unknown", as everywhere.

    Memory: that of ``provenance_codes``. Raises ValueError where it does, when no unit has a value among them.
    """
    codes, values = provenance_codes(prefix, field)
    own = list(dict.fromkeys(frequent))[:MOST_GROUPS]
    place = {name: number for number, name in enumerate(own)}
    rest = place.get(REST, len(own))
    groups = np.array([place.get(value, rest) for value in values], dtype=np.int8)[codes]
    has_rest = REST not in place and bool((groups == rest).any())
    return UnitGroups((*own, REST) if has_rest else tuple(own), groups)
