"""Copies units' tokens to a new ``.bin``, one after another: for compact subsets and for merged corpora."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import IO

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus, chosen, in_blocks

PIECE_BYTES = 1 << 22
"""Bytes hashed and copied at once."""


class UnitCopier:
    """Appends units to an open ``.bin`` and hashes what is written; constant memory.

    Units that lie one after another in their source are copied by the kernel in one piece (``copy_file_range``, which
    shares blocks on file systems that can); scattered ones are gathered a block at a time.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self.bin_bytes = stream, hashlib.sha256(), 0

    def copy(self, corpus: IndexedCorpus, ids: np.ndarray | None = None) -> UnitCopier:
        """Append units ``ids`` (increasing; None: all) of a corpus."""
        content = memoryview(corpus.tokens).cast("B") if len(corpus.tokens) else memoryview(b"")
        small, held = [], 0
        with open(corpus.bin_path, "rb", buffering=0) as source:
            for start, stop in _pieces(corpus, ids):
                large = stop - start == PIECE_BYTES
                if large or held >= PIECE_BYTES:
                    self._write(b"".join(small))
                    small, held = [], 0
                if large:
                    self._write(content[start:stop], source.fileno(), start)
                else:
                    small.append(content[start:stop])
                    held += stop - start
        self._write(b"".join(small))
        return self

    def record(self) -> dict:
        """What a manifest says of the finished ``.bin``."""
        return {"bin_bytes": self.bin_bytes, "bin_sha256": self._digest.hexdigest()}

    def _write(self, piece: bytes | memoryview, source: int | None = None, offset: int = 0) -> None:
        """Append a piece, by the kernel where it is said which file holds it at which byte."""
        self._digest.update(piece)
        self.bin_bytes += len(piece)
        if source is None or not self._copy_in_kernel(source, offset, len(piece)):
            self._stream.write(piece)

    def _copy_in_kernel(self, source: int, offset: int, count: int) -> bool:
        """Whether the kernel copied all of it; the stream then stands behind it."""
        self._stream.flush()
        begin, done = self._stream.tell(), 0
        with contextlib.suppress(OSError):  # the ordinary write that follows says what is wrong, if anything
            while done < count:
                moved = os.copy_file_range(source, self._stream.fileno(), count - done, offset + done, begin + done)
                if not moved:
                    break
                done += moved
        self._stream.seek(begin + done if done == count else begin)
        return done == count


def _pieces(corpus: IndexedCorpus, ids: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """:func:`_runs`, cut to at most ``PIECE_BYTES``."""
    for start, stop in _runs(corpus, ids):
        for first in range(start, stop, PIECE_BYTES):
            yield first, min(first + PIECE_BYTES, stop)


def _runs(corpus: IndexedCorpus, ids: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Byte ranges (start, stop) of ``.bin`` that hold the units in order, neighbours joined."""
    every = (in_blocks(corpus.lengths), in_blocks(corpus.pointers))
    parts = every if ids is None else (chosen(corpus.lengths, ids), chosen(corpus.pointers, ids))
    begin = end = 0
    for lengths, pointers in zip(*parts, strict=True):
        starts = np.array(pointers)
        stops = starts + lengths * np.int64(corpus.dtype.itemsize)
        breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(starts)], strict=True):
            if starts[first] != end:
                if end > begin:
                    yield begin, end
                begin = int(starts[first])
            end = int(stops[last - 1])
    if end > begin:
        yield begin, end
