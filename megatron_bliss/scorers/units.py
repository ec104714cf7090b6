"""Units of an indexed corpus as a flat array of tokens: a view of ``.bin`` wherever they lie one after another."""

from __future__ import annotations

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus


def flat_units(corpus: IndexedCorpus, start: int, stop: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [t], lengths int64 [n]) of units ``start`` to ``stop``, each cut to its first ``most`` tokens."""
    lengths = corpus.lengths[start:stop].astype(np.int64)
    begins = corpus.pointers[start:stop].astype(np.int64) // corpus.dtype.itemsize
    cut = lengths if most is None else np.minimum(lengths, most)
    if not len(lengths):
        return corpus.tokens[:0], cut
    if np.array_equal(cut, lengths) and np.array_equal(begins[1:], begins[:-1] + lengths[:-1]):
        return corpus.tokens[begins[0] : begins[-1] + lengths[-1]], cut
    rows = [corpus.tokens[begin : begin + size] for begin, size in zip(begins.tolist(), cut.tolist(), strict=True)]
    return np.concatenate(rows), cut
