"""N-grams of words that texts share with evaluation files: all of them, and no others.

Words of the evaluation files have numbers, -1 is any other word and the end of a text. Hashes of runs of numbers only
say where to look: every run that is reported has been compared with the evaluation text word by word.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np

from megatron_bliss.data.words import words_of

NO_WORD = -1
FACTOR, SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
SHIFT = np.uint64(29)
PLACES_PER_NGRAM = 8
"""Size of the table that rules out most hashes at a glance, in bytes for each n-gram."""


def mixed(hashes: np.ndarray) -> np.ndarray:
    """uint64 [n] -> uint64 [n]: the hashes with every bit spread over the high ones, which choose a table's place."""
    hashes = (hashes ^ (hashes >> SHIFT)) * SPREAD
    return hashes ^ (hashes >> SHIFT)


def run_hashes(numbers: np.ndarray, lengths: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(length, uint64 [n - length + 1]) for each of the increasing ``lengths``: hashes of all runs of that length.

    numbers: int32 [n]. Lengths above n are left out.
    """
    codes = numbers.astype(np.int64).view(np.uint64) * SPREAD + FACTOR
    value = codes
    for length in range(1, min(max(lengths, default=0), len(numbers)) + 1):
        if length > 1:
            value = value[:-1] * FACTOR
            value += codes[length - 1 :]
        if length in lengths:
            yield length, mixed(value)


def equal_runs(
    first: np.ndarray, starts: np.ndarray, second: np.ndarray, others: np.ndarray, length: int
) -> np.ndarray:
    """bool [n]: whether the run of ``first`` from ``starts[k]`` on is that of ``second`` from ``others[k]`` on."""
    places = np.arange(len(starts))
    for offset in range(length):
        places = places[first[starts[places] + offset] == second[others[places] + offset]]
    equal = np.zeros(len(starts), dtype=bool)
    equal[places] = True
    return equal


class EvaluationText:
    """Collects the texts of evaluation files: add files and records, then make :class:`SharedNgrams` of it.

    ngram: words of an n-gram. shortest: a text of fewer words than ``ngram`` but at least as many as this is one
    n-gram as a whole; a shorter one is left out. Memory: four bytes a word, the different words, 20 bytes a text.
    """

    def __init__(self, ngram: int, shortest: int) -> None:
        self.ngram, self.shortest = ngram, shortest
        self.files: list[str] = []
        self.records: list[int] = []  # of each file
        self.left_out: list[int] = []  # records of each file without a text that is long enough
        self.words = _Numbers()
        self.stream = array("i")
        self.starts, self.sizes, self.text_files, self.lines = array("q"), array("i"), array("i"), array("q")

    def add_file(self, path: str) -> None:
        """Begin a file: records that are added from now on are its own."""
        self.files.append(path)
        self.records.append(0)
        self.left_out.append(0)

    def add_record(self, line: int, texts: Sequence[str]) -> None:
        """Add a record of the last file."""
        used = 0
        for text in texts:
            words = words_of(text)
            if len(words) < self.shortest:
                continue
            used += 1
            self.starts.append(len(self.stream))
            self.sizes.append(len(words))
            self.text_files.append(len(self.files) - 1)
            self.lines.append(line)
            self.stream.extend(map(self.words.__getitem__, words))
            self.stream.append(NO_WORD)
        self.records[-1] += 1
        self.left_out[-1] += not used


class _Numbers(dict):
    """A number for every word, in the order in which they are asked for."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class Hit(NamedTuple):
    """What a unit shares: ``unit`` is its place among those asked about, ``file`` and ``line`` the first record's."""

    unit: int
    file: int
    line: int
    ngram: str
    shared: int


@dataclass
class _Table:
    """Different n-grams of one length with different hashes; their numbers are first_number, first_number + 1, ..."""

    hashes: np.ndarray
    """uint64 [n], increasing."""
    starts: np.ndarray
    """int64 [n]: where each is first in the stream."""
    first_number: int

    def __post_init__(self) -> None:
        bits = max(10, math.ceil(math.log2(PLACES_PER_NGRAM * len(self.hashes))))
        self._shift, self._taken = np.uint64(64 - bits), np.zeros(1 << bits, dtype=bool)
        self._taken[self._places(self.hashes)] = True

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._shift).view(np.int64)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places int64 [m] in ``hashes``, rows int64 [m] of this table) of equal hashes."""
        places = np.flatnonzero(self._taken[self._places(hashes)])
        rows = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self.hashes) - 1)
        equal = self.hashes[rows] == hashes[places]
        return places[equal], rows[equal]


class SharedNgrams:
    """Finds the n-grams that texts share with evaluation files.

    Memory: that of the :class:`EvaluationText`, and about 170 bytes an n-gram while it is made; for a call the
    words of its texts.
    """

    def __init__(self, evaluation: EvaluationText) -> None:
        self._text = evaluation
        self._stream = np.array(evaluation.stream, dtype=np.int32)
        self._starts, self._sizes, self._files, self._lines = (
            np.array(one, dtype=np.int64)
            for one in (evaluation.starts, evaluation.sizes, evaluation.text_files, evaluation.lines)
        )
        self.lengths = sorted(set(np.minimum(self._sizes, evaluation.ngram).tolist()))
        self._tables: dict[int, list[_Table]] = {length: [] for length in self.lengths}
        self._first: np.ndarray = np.zeros(0, dtype=np.int64)  # of each n-gram: where it is first in the stream
        self._length: np.ndarray = np.zeros(0, dtype=np.int64)
        owned = [np.zeros(0, dtype=np.int64)]
        for length, hashes in run_hashes(self._stream, self.lengths):
            owned.append(self._add_length(length, hashes))
        pairs = np.unique(np.concatenate(owned))
        self._owners = pairs % len(evaluation.files)
        self._bounds = np.searchsorted(pairs // len(evaluation.files), np.arange(len(self._first) + 1))
        self.ngrams = np.bincount(self._owners, minlength=len(evaluation.files)).tolist()
        """Different n-grams of each file."""
        self._spelling = list(evaluation.words)

    def _add_length(self, length: int, hashes: np.ndarray) -> np.ndarray:
        """Add the n-grams of one length; returns n-gram * files + file of each of their places, int64.

        Of n-grams with the same hash each goes to a table of its own: without collisions there is one table.
        """
        full = length == self._text.ngram
        texts = np.flatnonzero(self._sizes >= length if full else self._sizes == length)
        texts = np.repeat(texts, self._sizes[texts] - length + 1)
        before = np.searchsorted(texts, texts)  # where the text's first place is among these places
        places = self._starts[texts] + np.arange(len(texts)) - before
        left, owners = np.argsort(hashes[places], kind="stable"), np.zeros(len(places), dtype=np.int64)
        while len(left):
            own = hashes[places[left]]
            is_first = np.concatenate([[True], own[1:] != own[:-1]])
            group, heads = np.cumsum(is_first) - 1, places[left[is_first]]
            same = equal_runs(self._stream, places[left], self._stream, heads[group], length)
            owners[left[same]] = len(self._first) + group[same]
            self._tables[length].append(_Table(own[is_first], heads, len(self._first)))
            self._first = np.concatenate([self._first, heads])
            self._length = np.concatenate([self._length, np.full(len(heads), length)])
            left = left[~same]
        return owners * len(self._text.files) + self._files[texts]

    def numbers_of(self, text: str) -> np.ndarray:
        """int32 [words + 1]: the number of each word of a text, ``NO_WORD`` for others and at its end."""
        words = words_of(text)
        numbers = np.full(len(words) + 1, NO_WORD, dtype=np.int32)
        numbers[:-1] = np.fromiter(map(self._text.words.get, words, repeat(NO_WORD)), np.int32, len(words))
        return numbers

    def find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, n-grams) int64 [m] of every n-gram in int32 [n] numbers of words, in no order."""
        found = [(np.zeros(0, dtype=np.int64),) * 2]
        for length, hashes in run_hashes(numbers, self.lengths):
            for table in self._tables[length]:
                places, rows = table.find(hashes)
                equal = equal_runs(numbers, places, self._stream, table.starts[rows], length)
                found.append((places[equal], rows[equal] + table.first_number))
        places, ngrams = zip(*found, strict=True)
        return np.concatenate(places), np.concatenate(ngrams)

    def hits(self, texts: Sequence[str], units: Sequence[int]) -> tuple[list[Hit], np.ndarray]:
        """The units that share an n-gram, in order; and int64 [files], how many of them share one with each file.

        units: the unit of each text, not decreasing; no n-gram reaches from one text into the next.
        """
        numbers = [self.numbers_of(text) for text in texts]
        ends = np.cumsum([len(one) for one in numbers], dtype=np.int64)
        places, ngrams = self.find(np.concatenate(numbers)) if numbers else (np.zeros(0, np.int64),) * 2
        owners = np.asarray(units, dtype=np.int64)[np.searchsorted(ends, places, side="right")]
        pairs = np.unique(owners * len(self._first) + ngrams)  # each n-gram once in a unit
        owners, ngrams = np.divmod(pairs, max(len(self._first), 1))
        order = np.lexsort((self._first[ngrams], owners))
        heads = np.flatnonzero(np.diff(owners[order], prepend=-1))
        shared = np.diff(heads, append=len(order)).tolist()
        found = [
            self._hit(int(owners[row]), int(ngrams[row]), count)
            for row, count in zip(order[heads], shared, strict=True)
        ]
        return found, self._units_of_files(owners, ngrams)

    def _hit(self, unit: int, ngram: int, shared: int) -> Hit:
        place = int(self._first[ngram])
        text = int(np.searchsorted(self._starts, place, side="right")) - 1
        numbers = self._stream[place : place + int(self._length[ngram])].tolist()
        words = " ".join(self._spelling[number] for number in numbers)
        return Hit(unit, int(self._files[text]), int(self._lines[text]), words, shared)

    def _units_of_files(self, owners: np.ndarray, ngrams: np.ndarray) -> np.ndarray:
        """int64 [files]: units that share an n-gram with each file, from (unit, n-gram) pairs."""
        counts = self._bounds[ngrams + 1] - self._bounds[ngrams]
        rows = np.repeat(self._bounds[ngrams] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        files = len(self._text.files)
        pairs = np.unique(np.repeat(owners, counts) * files + self._owners[rows])
        return np.bincount(pairs % files, minlength=files)
