"""From scores to kept units: pure functions on numpy arrays.

A policy takes scores float[n] and returns the sorted int64 numbers of the units to keep: corpus order is kept, because
Megatron's train/validation splits are contiguous in index order. All are seeded and none depends on how many
processes ran.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa


def top_fraction(scores: np.ndarray, *, fraction: float, seed: int = 0) -> np.ndarray:
    """Units with the highest scores, ``round(fraction * n)`` of them (at least one); equal scores are drawn by seed."""
    scores = _checked(scores)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected more than 0 and at most 1: change selection.fraction")
    count = max(1, round(fraction * len(scores)))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)
    drawn = np.random.default_rng(seed).choice(equal, count - len(above), replace=False)
    return np.sort(np.concatenate([above, drawn]).astype(np.int64))


def above_threshold(scores: np.ndarray, *, threshold: float) -> np.ndarray:
    """Units that score at least ``threshold``."""
    return np.flatnonzero(_checked(scores) >= threshold).astype(np.int64)


POLICIES = {"top_fraction": top_fraction, "threshold": above_threshold}


def shards(
    num_units: int, num_shards: int, *, by: Literal["random", "range"] = "random", seed: int = 0
) -> list[np.ndarray]:
    """Deal units to disjoint shards that together hold every unit: sorted int64 arrays whose sizes differ by at most 1.

    by "random" deals them at random, by "range" in index order.
    """
    if not 1 <= num_shards <= num_units:
        raise ValueError(
            f"{num_shards} shards of {num_units} units, expected at least one unit per shard: lower rounds or prepare "
            "more data"
        )
    order = np.random.default_rng(seed).permutation(num_units) if by == "random" else np.arange(num_units)
    return [np.sort(part.astype(np.int64)) for part in np.array_split(order, num_shards)]


def domain_shares(provenance: pa.Table, ids: np.ndarray | None = None, field: str = "domain") -> dict[str, float]:
    """Share of units per value of a provenance column, the largest first; units without a value count as "unknown".

    provenance: one row per unit (:func:`megatron_bliss.data.subset.read_provenance`); ids: rows to count (None: all).
    An unknown column gives an empty result.
    """
    if field not in provenance.column_names:
        return {}
    column = provenance.column(field)
    column = column if ids is None else column.take(pa.array(np.asarray(ids, dtype=np.int64)))
    column = column.combine_chunks()
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if not len(values) or values.null_count == len(values):
        return {}
    counts = {
        ("unknown" if entry["values"] is None else str(entry["values"])): entry["counts"]
        for entry in values.value_counts().to_pylist()
    }
    return {name: count / len(values) for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores have shape {list(scores.shape)}, expected one number per unit")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(scores)} scores are not finite (unit {bad[0]}: {scores[bad[0]]}), expected numbers: "
            "score the shard again"
        )
    return scores
