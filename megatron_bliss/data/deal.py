"""The units of a corpus dealt to disjoint shards."""

from __future__ import annotations

from typing import Literal

import numpy as np


def deal_shards(
    num_units: int,
    num_shards: int,
    *,
    by: Literal["random", "range", "file"] = "random",
    seed: int = 0,
    files: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Deal units to disjoint shards that together hold every unit: sorted int64 arrays.

    by "random" deals them at random and "range" in index order: sizes differ by at most 1. "file" keeps the units of a
    source file together (files: int[n], its number per unit): the largest file first, always to the smallest shard.
    """
    if not 1 <= num_shards <= num_units:
        raise ValueError(
            f"{num_shards} shards of {num_units} units, expected at least one unit per shard: lower rounds or prepare "
            "more data"
        )
    if by == "file":
        owners = _deal_files(np.bincount(files), num_shards, np.random.default_rng(seed))[files]
        return [np.flatnonzero(owners == shard) for shard in range(num_shards)]
    order = np.random.default_rng(seed).permutation(num_units) if by == "random" else np.arange(num_units)
    return [np.sort(part.astype(np.int64)) for part in np.array_split(order, num_shards)]


def _deal_files(sizes: np.ndarray, num_shards: int, generator: np.random.Generator) -> np.ndarray:
    """int[files]: the shard of each file; files of equal size in random order."""
    filled = np.flatnonzero(sizes)
    if len(filled) < num_shards:
        raise ValueError(
            f"{len(filled)} source files for {num_shards} shards, expected at least one file per shard: lower rounds, "
            "or take data.shard_by random or range"
        )
    owners, loads = np.zeros(len(sizes), dtype=np.int64), np.zeros(num_shards, dtype=np.int64)
    shuffled = generator.permutation(filled)
    for file in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        owners[file] = loads.argmin()
        loads[owners[file]] += sizes[file]
    return owners
