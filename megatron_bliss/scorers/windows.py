"""Units as the windows that a scorer reads, and the scores of a unit's windows as one score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

LongDocuments = Literal["mean", "max", "first"]
"""What the score of a unit longer than a window is: the mean of its windows' scores, weighted by their tokens, the
largest of them, or that of the first, as a run takes it, whose target sees no more."""


@dataclass(frozen=True)
class Windows:
    """Windows over a flat array of tokens: window k is tokens [starts[k], starts[k] + sizes[k]), and of one unit alone.

    starts, sizes: int64 [k]. first: int64 [n], the first window of each unit; a unit has at least one, which is empty
    where the unit is.
    """

    starts: np.ndarray
    sizes: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def joined(self, scores: np.ndarray, how: LongDocuments) -> np.ndarray:
        """Scores float32 [n] of units from those of their windows [k]."""
        if len(self.first) == len(self.starts):
            return scores.astype(np.float32, copy=False)
        if how == "max":
            return np.maximum.reduceat(scores, self.first).astype(np.float32, copy=False)
        sizes = np.maximum(self.sizes, 1).astype(np.float64)  # a unit of no token has one window, whose score it takes
        total = np.add.reduceat(scores.astype(np.float64) * sizes, self.first)
        return (total / np.add.reduceat(sizes, self.first)).astype(np.float32)


def cut(lengths: np.ndarray, window: int, how: LongDocuments) -> Windows:
    """Windows of at most ``window`` tokens of units that follow each other in an array; lengths: int64 [n]."""
    lengths = np.asarray(lengths, dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    first = np.arange(len(lengths))
    if not len(lengths) or lengths.max() <= window:
        return Windows(begins, lengths, first)
    if how == "first":
        return Windows(begins, np.minimum(lengths, window), first)
    counts = np.maximum(-(-lengths // window), 1)
    first = np.cumsum(counts) - counts
    place = np.arange(int(counts.sum())) - np.repeat(first, counts)  # of a window in its unit
    offsets = place * window
    return Windows(np.repeat(begins, counts) + offsets, np.minimum(np.repeat(lengths, counts) - offsets, window), first)


def groups(windows: Windows, tokens: int) -> Iterator[slice]:
    """Windows that follow each other, about ``tokens`` tokens at a time, and at least one."""
    ends, start = np.cumsum(windows.sizes), 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + tokens, side="right")))
        yield slice(start, stop)
        start = stop
