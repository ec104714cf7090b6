"""Windows: documents joined into one stream and cut into units of one length."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


class WindowCutter:
    """Joins documents into one stream, cuts it into windows of ``length`` tokens, keeps each one's first document.

    Only lengths and rows pass through here: the stream itself is the documents' tokens one after another.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens = 0  # of documents that are not in a window yet
        self._starts = np.zeros(0, dtype=np.int64)  # where each document of _rows begins, among those tokens
        self._rows: pa.Table | None = None

    def add(self, lengths: np.ndarray, rows: pa.Table | None) -> tuple[np.ndarray, pa.Table | None]:
        """Append documents: int64 lengths, and provenance rows if they are kept; returns those of full windows."""
        begins = np.cumsum(lengths) - lengths + self.tokens
        self.tokens += int(lengths.sum())
        if rows is not None:
            self._starts = np.concatenate([self._starts, begins])
            self._rows = rows if self._rows is None else pa.concat_tables([self._rows, rows])
        return self._cut(self.tokens // self.length)

    def finish(self) -> tuple[np.ndarray, pa.Table | None]:
        """The last, short window, if it has at least two tokens (one to see and one to predict).

        ``tokens`` then says how many at the end are in no window: none or one.
        """
        return self._cut(1) if self.tokens >= 2 else self._cut(0)

    def _cut(self, windows: int) -> tuple[np.ndarray, pa.Table | None]:
        firsts = np.arange(windows, dtype=np.int64) * self.length
        ends = np.minimum(firsts + self.length, self.tokens)
        used = int(ends[-1]) if windows else 0
        self.tokens -= used
        if self._rows is None:
            return ends - firsts, None
        owners = np.searchsorted(self._starts, firsts, side="right") - 1
        cut = ends - firsts, self._rows.take(owners)
        kept = max(int(np.searchsorted(self._starts, used, side="right")) - 1, 0)
        self._starts = self._starts[kept:] - used
        self._rows = self._rows.slice(kept).combine_chunks()
        return cut
