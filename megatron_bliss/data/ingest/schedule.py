"""Which worker does which piece: files in order, a worker stays with its file, and idle workers join the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class _File:
    pieces: int | None  # None: not known before the end was reached
    done: Collection[int]
    next_piece: int = 0
    readers: set[int] = field(default_factory=set)

    def skip_done(self) -> None:
        while self.next_piece in self.done:
            self.next_piece += 1

    @property
    def has_more(self) -> bool:
        self.skip_done()
        return self.pieces is None or self.next_piece < self.pieces


class Schedule:
    """Hands out (source, piece); the result of the run does not depend on the order.

    A compressed file is read from its beginning by everyone who works on it, so workers share one only when there is
    no other left.
    """

    def __init__(self, pieces: list[int | None], done: list[Collection[int]]) -> None:
        self._files = [_File(count, finished) for count, finished in zip(pieces, done, strict=True)]
        self._first = 0  # files before it are all handed out
        self._current: dict[int, int] = {}

    def next(self, worker: int) -> tuple[int, int] | None:
        """The next piece for this worker; None when all are handed out."""
        source = self._choose(worker)
        if source is None:
            return None
        file = self._files[source]
        if self._current.get(worker) != source:
            self._leave(worker)
            self._current[worker] = source
            file.readers.add(worker)
        file.next_piece += 1
        return source, file.next_piece - 1

    def ended(self, source: int, pieces: int) -> None:
        """Note that a file turned out to have this many pieces."""
        known = self._files[source].pieces
        self._files[source].pieces = pieces if known is None else min(known, pieces)

    def _choose(self, worker: int) -> int | None:
        current = self._current.get(worker)
        if current is not None and self._files[current].has_more:
            return current
        while self._first < len(self._files) and not self._files[self._first].has_more:
            self._first += 1
        least, chosen = None, None
        for source in range(self._first, len(self._files)):
            file = self._files[source]
            if file.has_more and (least is None or len(file.readers) < least):
                least, chosen = len(file.readers), source
                if not least:
                    break
        return chosen

    def _leave(self, worker: int) -> None:
        if worker in self._current:
            self._files[self._current[worker]].readers.discard(worker)
