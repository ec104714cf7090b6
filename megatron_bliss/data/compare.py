"""Two subsets of one corpus side by side."""

from __future__ import annotations

import os

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.subset import FieldWithoutValues, provenance_codes, root_prefix, units_within


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


def _shares(first: str | os.PathLike, second: str | os.PathLike, field: str) -> dict[str, tuple[float, float]]:
    if not os.path.isfile(f"{root_prefix(first)}.provenance.parquet"):
        return {}
    counts, names = [], []
    for prefix in (first, second):
        try:
            codes, names = provenance_codes(prefix, field)
        except FieldWithoutValues:
            return {}
        counts.append(np.bincount(codes, minlength=len(names)) / max(1, len(codes)))
    change = np.argsort(-np.abs(counts[1] - counts[0]), kind="stable")
    return {names[i]: (float(counts[0][i]), float(counts[1][i])) for i in change.tolist()}
