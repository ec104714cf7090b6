"""What a corpus is made of, and two subsets of one corpus side by side."""

from __future__ import annotations

import os

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.subset import FieldWithoutValues, provenance_codes, root_prefix, units_within
from megatron_bliss.selection import domain_shares


def compare_units(first: str | os.PathLike, second: str | os.PathLike, field: str = "domain") -> dict:
    """What two subsets of the same root corpus share.

    Returns {"first", "second": units; "shared"; "only_in_first", "only_in_second"; "jaccard": shared / all;
    "shared_tokens"; "shift": half the sum of absolute differences of the domains' shares (0: the same mixture, 1:
    nothing in common), None where domains are not known; "shares": {domain: (share in first, share in second)}, the
    largest change first}. Raises ValueError for subsets of different corpora.
    """
    ours, theirs = IndexedCorpus(first), IndexedCorpus(second)
    places = units_within(second, first)
    shared, everything = len(places), len(ours) + len(theirs) - len(places)
    shares = _shares(first, second, field)
    return {
        "first": len(ours),
        "second": len(theirs),
        "shared": shared,
        "only_in_first": len(ours) - shared,
        "only_in_second": len(theirs) - shared,
        "jaccard": shared / everything if everything else 1.0,
        "shared_tokens": int(ours.lengths[places].sum(dtype=np.int64)),
        "shift": sum(abs(a - b) for a, b in shares.values()) / 2 if shares else None,
        "shares": shares,
    }


def shares_of(prefix: str | os.PathLike, field: str = "domain") -> dict[str, float]:
    """Share of units per value of a provenance column, the largest first; {} where the corpus does not know it."""
    if not os.path.isfile(f"{root_prefix(prefix)}.provenance.parquet"):
        return {}
    try:
        return domain_shares(*provenance_codes(prefix, field))
    except FieldWithoutValues:
        return {}


def _shares(first: str | os.PathLike, second: str | os.PathLike, field: str) -> dict[str, tuple[float, float]]:
    ours, theirs = shares_of(first, field), shares_of(second, field)
    pairs = {name: (ours.get(name, 0.0), theirs.get(name, 0.0)) for name in [*ours, *theirs]}
    return dict(sorted(pairs.items(), key=lambda item: -abs(item[1][1] - item[1][0])))
