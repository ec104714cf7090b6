"""Units that are nearly the same as a better one.

A unit stands for the set of its token 5-grams. How alike two units are is the Jaccard similarity |A ∩ B| / |A ∪ B| of
their sets. MinHash signatures estimate it (Broder, "On the resemblance and containment of documents", 1997): it is the
share of places in which two signatures are equal. Only units that agree in all places of one band of their signatures
are compared (locality-sensitive hashing), as all but a few similar pairs do.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.selection.best import finite_scores

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 5
"""Tokens of an n-gram; a shorter unit is one n-gram."""
PLACES = 128
"""Of a signature: the estimate's standard deviation is at most 0.5 / sqrt(128) = 0.044."""
MISSED = 0.01
"""Largest share of pairs at the threshold that agree in no band."""


def check_library() -> None:
    """ValueError where the library that makes and looks up signatures is not installed."""
    if find_spec("datasketch") is None:
        raise ValueError(
            "found selection.near_duplicates, but no package datasketch, expected it to be installed: pip install "
            "'.[duplicates]' -c constraints.txt, or set near_duplicates to 0"
        )


def without_near_duplicates(
    corpus: IndexedCorpus, ids: np.ndarray, scores: np.ndarray, threshold: float, *, seed: int
) -> np.ndarray:
    """Which of the units ``ids`` stay: bool[n].

    From the best score down, a unit stays unless it is at least ``threshold`` similar to one that stays already.
    scores: float[n]; among equal ones the order is drawn. All that is random follows from ``seed``.
    """
    check_library()
    from datasketch import MinHash, MinHashLSH  # an extra of the package

    generator = np.random.default_rng([seed, SHINGLE])  # not the numbers that a policy draws with the same seed
    order = np.lexsort((generator.random(len(ids)), -finite_scores(scores).astype(np.float64)))
    sketch = MinHash(num_perm=PLACES, seed=int(generator.integers(1 << 32)), hashfunc=int)
    found, (number, rows) = _signatures(corpus, ids, sketch, generator), bands(threshold)
    stays = ~_share_a_band(found, number, rows, generator)  # those alone in their bands are like no other
    index = MinHashLSH(num_perm=PLACES, params=(number, rows))
    for place in order[~stays[order]].tolist():
        sketch.hashvalues = found[place]
        alike = index.query(sketch)
        if not alike or (found[alike] == found[place]).mean(axis=1).max() < threshold:
            index.insert(place, sketch, check_duplication=False)
            stays[place] = True
    return stays


def _signatures(corpus: IndexedCorpus, ids: np.ndarray, empty: MinHash, generator: np.random.Generator) -> np.ndarray:
    """uint32[n, PLACES]: the signatures of units."""
    multipliers = generator.integers(1 << 64, size=SHINGLE, dtype=np.uint64)
    found = np.empty((len(ids), PLACES), dtype=empty.hashvalues.dtype)
    for place, unit in enumerate(ids.tolist()):
        sketch, hashes = empty.copy(), shingle_hashes(corpus[unit], multipliers)
        for part in blocks(len(hashes)):
            sketch.update_batch(hashes[part].tolist())
        found[place] = sketch.hashvalues
    return found


def _share_a_band(signatures: np.ndarray, number: int, rows: int, generator: np.random.Generator) -> np.ndarray:
    """bool[n]: whether another unit agrees in a whole band; they alone need the index, which takes KiB per unit."""
    multipliers = generator.integers(1 << 64, size=rows, dtype=np.uint64)
    shared = np.zeros(len(signatures), dtype=bool)
    for first in range(0, number * rows, rows):
        keys = signatures[:, first : first + rows] @ multipliers  # two bands with one key by chance do no harm
        ordered = np.sort(keys)
        shared |= np.isin(keys, ordered[1:][ordered[1:] == ordered[:-1]])
    return shared


def shingle_hashes(tokens: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """uint32[m]: a hash of every n-gram of a unit of so many tokens as there are multipliers (uint64).

    Multilinear modulo 2^64, of which the upper half is taken: universal (Lemire and Kaser, arXiv 1202.4961).
    """
    shifted = np.zeros(max(len(tokens), len(multipliers)), dtype=np.uint64)
    shifted[: len(tokens)] = tokens
    shifted[: len(tokens)] += np.uint64(1)  # so that the 0 that fills up a short unit is no token
    sums = (sliding_window_view(shifted, len(multipliers)) * multipliers).sum(axis=1)
    return (sums >> np.uint64(32)).astype(np.uint32)


def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many places: the longest that miss at most ``MISSED`` of the pairs at the threshold.

    A pair of similarity s agrees in a band of r places with probability s^r.
    """
    fitting = [rows for rows in range(2, PLACES // 2 + 1) if (1 - threshold**rows) ** (PLACES // rows) <= MISSED]
    rows = max(fitting, default=1)
    return PLACES // rows, rows
