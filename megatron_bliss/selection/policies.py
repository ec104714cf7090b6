"""From scores to kept units: pure functions on numpy arrays.

A policy takes scores float[n] and returns the sorted int64 numbers of the units to keep: corpus order is kept, because
Megatron's train/validation splits are contiguous in index order. All are seeded (``seed`` draws among units of equal
score) and none depends on how many processes ran. Scores are never sorted as a whole: the time
is that of a few passes over them, the memory a few bytes per unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_bliss.config.data import ShardBy
from megatron_bliss.data.indexed import blocks


def top_fraction(scores: np.ndarray, *, fraction: float, seed: int = 0) -> np.ndarray:
    """Units with the highest scores, ``round(fraction * n)`` of them (at least one); equal scores are drawn by seed."""
    scores = _checked(scores)
    return _best(scores, _share(fraction, len(scores)), np.random.default_rng(seed))


def above_threshold(scores: np.ndarray, *, threshold: float, seed: int = 0) -> np.ndarray:
    """Units that score at least ``threshold``; nothing is drawn."""
    return np.flatnonzero(_checked(scores) >= threshold)


def token_budget(scores: np.ndarray, *, lengths: np.ndarray, tokens: int, seed: int = 0) -> np.ndarray:
    """The best units that together hold at most ``tokens`` tokens: by score, up to the first that does not fit.

    lengths: int[n], tokens per unit. Raises ValueError when not even the best unit fits.
    """
    scores = _checked(scores)
    if tokens < 1:
        raise ValueError(f"token budget is {tokens}, expected at least 1: change selection.tokens")
    bins = _coarse_rank(scores)
    sizes = sum(
        (np.bincount(bins[part], weights=lengths[part], minlength=1 << 16) for part in blocks(len(bins))),
        np.zeros(1 << 16),
    )
    from_above = np.cumsum(sizes[::-1])[::-1]  # tokens of a bin and of all better ones
    if from_above[0] <= tokens:
        return np.arange(len(scores))
    last = int(np.flatnonzero(from_above > tokens)[-1])  # the bin in which the budget ends
    room = tokens - int(from_above[last] - sizes[last])
    kept, edge = bins > last, np.flatnonzero(bins == last)
    order = edge[np.lexsort((np.random.default_rng(seed).random(len(edge)), -scores[edge].astype(np.float64)))]
    kept[order[np.cumsum(lengths[order], dtype=np.int64) <= room]] = True
    ids = np.flatnonzero(kept)
    if not len(ids):
        raise ValueError(f"token budget is {tokens}, but the best unit has {lengths[order[0]]}: raise selection.tokens")
    return ids


def gumbel_top_k(scores: np.ndarray, *, fraction: float, temperature: float, seed: int = 0) -> np.ndarray:
    """A random subset that favours high scores: the top fraction of score / temperature + Gumbel noise.

    The same as drawing units one after another, without replacement, each with probability proportional to
    exp(score / temperature). Towards temperature 0 it is the top fraction, towards infinity a uniform draw.
    """
    scores = _checked(scores)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0: change selection.temperature")
    generator, keys = np.random.default_rng(seed), np.empty(len(scores), dtype=np.float32)
    stretch, spread = max(temperature, 1.0), min(temperature, 1.0)  # so that neither term overflows or vanishes
    for part in blocks(len(scores)):
        noise = generator.gumbel(size=part.stop - part.start)
        keys[part] = scores[part].astype(np.float64) / stretch + spread * noise
    return _best(keys, _share(fraction, len(scores)), generator)


def proportional(scores: np.ndarray, *, groups: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """The top fraction of every group (a domain, say), so that the selection has the corpus's mixture.

    groups: int[n], a number from 0 on per unit. Sizes are rounded such that ``round(fraction * n)`` units are kept.
    """
    scores = _checked(scores)
    sizes = np.bincount(groups)
    exact = sizes * (_share(fraction, len(scores)) / len(scores))
    counts = np.floor(exact).astype(np.int64)
    missing = _share(fraction, len(scores)) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return _best_of_groups(scores, groups, counts, np.random.default_rng(seed))


def quotas(
    scores: np.ndarray,
    *,
    groups: np.ndarray,
    names: Sequence[str],
    shares: Mapping[str, float],
    fraction: float,
    seed: int = 0,
) -> np.ndarray:
    """``round(fraction * n)`` units, of which group g makes up ``shares[g]``: the best units of each group.

    groups: int[n], indices into ``names``. Where the shares do not sum to 1, the best units of all groups that are not
    named fill what is left. Raises ValueError for an unknown group and one that has too few units.
    """
    scores = _checked(scores)
    unknown = [name for name in shares if name not in names]
    if unknown or not shares:
        raise ValueError(
            f"quotas for {', '.join(map(repr, unknown)) or 'nothing'}, expected some of {', '.join(map(repr, names))}: "
            "change selection.quotas"
        )
    if min(shares.values()) < 0 or sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"quotas {dict(shares)}, expected shares of 0 or more that sum to at most 1: selection.quotas")
    total = _share(fraction, len(scores))
    wanted = {name: round(share * total) for name, share in shares.items()}
    rest = len(names)  # groups without a quota compete as one
    merged = np.array([number if name in shares else rest for number, name in enumerate(names)])[groups]
    counts = np.array([*(wanted.get(name, 0) for name in names), max(0, total - sum(wanted.values()))])
    sizes = np.bincount(merged, minlength=rest + 1)
    for name, count, size in zip([*names, "all other groups together"], counts.tolist(), sizes.tolist(), strict=True):
        if count > size:
            raise ValueError(
                f"{size} units of {name}, but the quota takes {count}: lower its share in selection.quotas, or "
                "selection.fraction"
            )
    return _best_of_groups(scores, merged, counts, np.random.default_rng(seed))


POLICIES = {
    "top_fraction": top_fraction,
    "threshold": above_threshold,
    "token_budget": token_budget,
    "gumbel": gumbel_top_k,
    "proportional": proportional,
    "quotas": quotas,
}


def union(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Units that any of the selections holds."""
    return np.flatnonzero(_votes(selections, num_units) > 0)


def intersection(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Units that all of the selections hold."""
    return np.flatnonzero(_votes(selections, num_units) == len(selections))


COMBINATIONS = {"union": union, "intersection": intersection}


def mean_score(scores: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean float32[n] of several scores of the same units, each standardised (mean 0, deviation 1) first."""
    weights = [1.0] * len(scores) if weights is None else list(weights)
    if len(weights) != len(scores) or not sum(map(abs, weights)) > 0:
        raise ValueError(
            f"{len(weights)} weights {weights} for {len(scores)} score files, expected one each: --weights"
        )
    total = np.zeros(len(scores[0]), dtype=np.float32)
    for one, weight in zip(scores, weights, strict=True):
        centre, deviation = _checked(one).mean(dtype=np.float64), one.std(dtype=np.float64)
        scale = weight / (sum(map(abs, weights)) * (deviation or 1.0))
        for part in blocks(len(total)):
            total[part] += ((one[part].astype(np.float64) - centre) * scale).astype(np.float32)
    return total


def shards(
    num_units: int,
    num_shards: int,
    *,
    by: ShardBy = "random",
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


def _share(fraction: float, count: int) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected more than 0 and at most 1: change selection.fraction")
    return max(1, round(fraction * count))


def _best(keys: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """The ``count`` largest keys, in order of their place; among equal ones at the threshold the generator draws."""
    place = len(keys) - count
    threshold = np.partition(keys, place)[place]
    kept = keys > threshold
    equal = np.flatnonzero(keys == threshold)
    kept[generator.choice(equal, count - np.count_nonzero(kept), replace=False)] = True
    return np.flatnonzero(kept)


def _best_of_groups(
    scores: np.ndarray, groups: np.ndarray, counts: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The ``counts[g]`` best units of every group g."""
    members = np.argsort(groups.astype(np.uint16) if len(counts) < 1 << 16 else groups, kind="stable")  # 16 bits: radix
    ends = np.cumsum(np.bincount(groups, minlength=len(counts)))
    kept = np.zeros(len(scores), dtype=bool)
    for first, last, count in zip([0, *ends.tolist()], ends.tolist(), counts.tolist(), strict=False):
        if count:
            kept[members[first:last][_best(scores[members[first:last]], count, generator)]] = True
    return np.flatnonzero(kept)


def _coarse_rank(scores: np.ndarray) -> np.ndarray:
    """uint16[n] that never decreases with the score: the first 16 bits of the float, made to sort as an integer."""
    scores = scores if scores.dtype in (np.float32, np.float64) else scores.astype(np.float64)
    bits = scores.dtype.itemsize * 8
    unsigned, ranks = np.dtype(f"u{scores.dtype.itemsize}"), np.empty(len(scores), dtype=np.uint16)
    for part in blocks(len(scores)):
        raw = (scores[part] + 0).view(unsigned)  # + 0: minus zero becomes zero, to which it is equal
        top = (raw >> unsigned.type(bits - 16)).astype(np.uint16)
        ranks[part] = np.where(top >> 15, ~top, top | np.uint16(1 << 15))
    return ranks


def _votes(selections: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    votes = np.zeros(num_units, dtype=np.uint8)
    for ids in selections:
        votes[ids] += 1
    return votes


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores have shape {list(scores.shape)}, expected one number per unit")
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise ValueError(
            f"{len(bad)} of {len(scores)} scores are not finite (unit {bad[0]}: {scores[bad[0]]}), expected numbers: "
            "score the shard again"
        )
    return scores
