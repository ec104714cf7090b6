"""A linear model over hashed n-grams, in numpy: what counts, classifiers and importance weights come to.

    s = a(b + sum_j c_j t_j)              reduce "sum", c_j: how often an n-gram of bucket j occurs
    s = a(b + sum_j c_j t_j / sum_j c_j)  reduce "mean"; s = a(b) where there is no n-gram

N-grams are those of data/ngrams.py: n = 1 … max_ngram, none with the token that ends documents, none from one window
into the next. Sums are in fp64, and each window's is the same whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from megatron_bliss.data.ngrams import bucket_of, hashed_ngrams
from megatron_bliss.scorers.record import record_of
from megatron_bliss.scorers.windows import Windows, groups

BLOCK_TOKENS = 1 << 15
"""Tokens at a time: what is made of them stays in the processor's cache."""
_FIRST, _SECOND = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
"""As in data/ngrams.py."""
LARGEST_VOCABULARY = 1 << 24
"""So that nothing larger is allocated for a description from elsewhere."""
_HALF, _THIRTY_ONE = np.uint64(33), np.uint64(31)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and its share 0, as it should be
        return 1.0 / (1.0 + np.exp(-values))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"identity": lambda values: values, "sigmoid": _sigmoid}


@dataclass(frozen=True)
class NgramForm:
    """All of such a model but its table."""

    max_ngram: int
    vocab_size: int
    eod: int | None
    """Token that ends documents; None: no token does."""
    reduce: Literal["mean", "sum"] = "mean"
    bias: float = 0.0
    activation: str = "identity"

    def __post_init__(self) -> None:
        if not (1 <= self.max_ngram <= 8 and 1 <= self.vocab_size <= LARGEST_VOCABULARY):
            raise ValueError(
                f"found max_ngram {self.max_ngram} and vocab_size {self.vocab_size} in a scorer, expected 1 to 8 and 1 "
                f"to {LARGEST_VOCABULARY}: export it again"
            )
        if self.activation not in ACTIVATIONS or self.reduce not in ("mean", "sum"):
            raise ValueError(
                f"found activation {self.activation!r} and reduce {self.reduce!r} in a scorer, expected one of "
                f"{', '.join(ACTIVATIONS)}, and mean or sum: export it again"
            )


class NgramScorer:
    """The model itself. table: fp32 or fp64 [buckets], t."""

    kind = "ngrams"

    def __init__(self, form: NgramForm, table: np.ndarray) -> None:
        self.form, self.table = form, np.ascontiguousarray(table)
        self.vocab_size = form.vocab_size
        ids = np.arange(form.vocab_size, dtype=np.int64)
        (hashes, _), *_ = hashed_ngrams(ids, np.ones(len(ids), bool), 1)
        self._hashes = hashes.view(np.uint64)  # of every token
        self._unigrams = self.table[bucket_of(hashes, len(table))].astype(np.float64)
        if form.eod is not None and form.eod < form.vocab_size:
            self._unigrams[form.eod] = 0.0

    def describe(self) -> dict:
        """What the folder says of it beside its weights."""
        return asdict(self.form)

    def weights(self) -> dict[str, np.ndarray]:
        """Arrays by name."""
        return {"table": self.table}

    @classmethod
    def load(cls, described: Mapping, weights: Mapping[str, np.ndarray]) -> NgramScorer:
        """From what :meth:`describe` and :meth:`weights` gave; ValueError for anything else."""
        table = weights.get("table")
        if table is None or table.ndim != 1 or not len(table) or table.dtype not in (np.float32, np.float64):
            raise ValueError("found no table [buckets] of numbers in the weights of a scorer, expected one: export it")
        return cls(record_of(NgramForm, described), table)

    def score_windows(self, tokens: np.ndarray, windows: Windows) -> np.ndarray:
        """Scores float64 [k] of windows over tokens [t], integers below the vocabulary's size."""
        found = np.empty(len(windows))
        for part in groups(windows, BLOCK_TOKENS):
            starts, sizes = windows.starts[part], windows.sizes[part]
            found[part] = self._score(*_stretch(tokens, starts, sizes), sizes)
        return ACTIVATIONS[self.form.activation](found + self.form.bias)

    def _score(self, tokens: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Sums or means float64 [k] of windows that follow each other in ``tokens`` [t]; begins: where each does."""
        inside = sizes > 0
        if not inside.any():
            return np.zeros(len(sizes))
        begins, places = begins[inside], tokens.astype(np.intp)
        values, counts = self._unigrams.take(places), sizes[inside].copy()
        ends = np.zeros(len(tokens), bool) if self.form.eod is None else tokens == self.form.eod
        counts -= _in_each(np.flatnonzero(ends), begins)
        stops, broken = ends.copy(), ends
        stops[begins] = True  # no longer n-gram ends here
        for entries in self._longer(places):
            broken = np.concatenate([[True], broken[:-1]]) | stops
            incomplete = np.flatnonzero(broken)
            entries[incomplete] = 0.0
            values += entries
            counts += sizes[inside] - _in_each(incomplete, begins)
        found = np.zeros(len(sizes))
        found[inside] = np.add.reduceat(values, begins)
        if self.form.reduce == "mean":
            found[inside] /= np.maximum(counts, 1)
        return found

    def _longer(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """For n = 2 …: float [t], the entry of the n-gram that ends at each token, whether it is complete or not."""
        if self.form.max_ngram == 1:
            return
        hashes = self._hashes.take(tokens)
        ngram, spare = hashes.copy(), np.empty_like(hashes)
        for _ in range(2, self.form.max_ngram + 1):
            np.multiply(ngram[:-1], _THIRTY_ONE, out=spare[1:])
            np.add(spare[1:], hashes[1:], out=ngram[1:])
            _mix(ngram, spare)
            yield self.table.take(self._buckets(ngram, spare))

    def _buckets(self, hashes: np.ndarray, spare: np.ndarray) -> np.ndarray:
        """int64 [t], written into ``spare``."""
        count = len(self.table)
        if count & (count - 1) == 0:
            return np.bitwise_and(hashes, np.uint64(count - 1), out=spare).view(np.int64)
        return np.remainder(hashes, np.uint64(count), out=spare).view(np.int64)


def _in_each(places: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """int64 [k]: how many of the increasing ``places`` lie in each window, which ends where the next one begins."""
    return np.diff(np.append(np.searchsorted(places, begins), len(places)))


def _mix(values: np.ndarray, spare: np.ndarray) -> None:
    """What data/ngrams.py does to each hash, uint64 [t], in place; ``spare`` is as large."""
    for factor in (_FIRST, _SECOND):
        np.right_shift(values, _HALF, out=spare)
        np.bitwise_xor(values, spare, out=values)
        np.multiply(values, factor, out=values)
    np.right_shift(values, _HALF, out=spare)
    np.bitwise_xor(values, spare, out=values)


def _stretch(tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, begins): the tokens of windows one after another, without a copy where they lie so already."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    first, total = int(starts[0]), int(ends[-1])
    if np.array_equal(starts - first, begins):
        return tokens[first : first + total], begins
    return tokens[np.repeat(starts - begins, sizes) + np.arange(total)], begins
