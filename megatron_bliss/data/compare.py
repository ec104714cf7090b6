"""What a corpus is made of, and two subsets of one corpus side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.provenance import FieldWithoutValues, provenance_codes
from megatron_bliss.data.subset import root_prefix, units_within


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


def domain_shares(codes: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Share of units per domain, the largest first; domains without a unit are left out.

    codes: int[n], indices into ``names`` (:func:`megatron_bliss.data.provenance.provenance_codes`).
    """
    shares = np.bincount(codes, minlength=len(names)) / max(1, len(codes))
    found = {name: float(share) for name, share in zip(names, shares, strict=True) if share}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _shares(first: str | os.PathLike, second: str | os.PathLike, field: str) -> dict[str, tuple[float, float]]:
    ours, theirs = shares_of(first, field), shares_of(second, field)
    pairs = {name: (ours.get(name, 0.0), theirs.get(name, 0.0)) for name in [*ours, *theirs]}
    return dict(sorted(pairs.items(), key=lambda item: -abs(item[1][1] - item[1][0])))
