"""A piece of a corpus in one file: tokens, lengths, provenance rows, rejects, and a JSON object that says so.

A piece appears under its name only when it is complete, so a name is all a resumed run has to look for.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
import orjson
import pyarrow as pa

from megatron_bliss.base.files import atomic_file
from megatron_bliss.data.ingest.provenance import ROW_SCHEMA

MAGIC = b"BLISSPC1"
TAIL = struct.Struct("<Q8s")  # size of the JSON object, magic


@dataclass(frozen=True)
class PieceSummary:
    """What a piece holds. Sizes in bytes stand in the order of the parts in its file.

    lines: of the source, blank ones included; last: nothing of the source follows; sha256: of the whole source, where
    it is known; text_bytes: as read, after decompression; file_bytes: of the source on disk, up to the piece's end.
    """

    source: int
    piece: int
    documents: int
    tokens: int
    rejected: int
    lines: int
    text_bytes: int
    file_bytes: int
    last: bool
    damage: str | None
    sha256: str | None
    sizes: tuple[int, int, int, int]


def piece_path(folder: str, source: int, piece: int) -> str:
    """Name of a piece in its folder; sorted names are in the order of the corpus."""
    return os.path.join(folder, f"{source:08d}-{piece:08d}.piece")


class PieceWriter:
    """Collects a piece: tokens go to disk as they come, the rest (a few bytes per document) at the end."""

    def __init__(self, stream: IO[bytes], dtype: np.dtype) -> None:
        self._stream, self._dtype = stream, dtype.newbyteorder("<")
        self._lengths: list[np.ndarray] = []
        self._rows: list[pa.RecordBatch] = []
        self._rejects = io.BytesIO()
        self.tokens = self.rejected = self.text_bytes = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, rows: pa.RecordBatch | None) -> None:
        """Append documents: their tokens one after another, int64 lengths, and their provenance if it is kept."""
        self._stream.write(np.ascontiguousarray(tokens, dtype=self._dtype))
        self._lengths.append(lengths)
        self.tokens += len(tokens)
        if rows is not None:
            self._rows.append(rows)

    def reject(self, line: int, reason: str) -> None:
        """Note a line that cannot be used; lines count from 1 in the piece."""
        self._rejects.write(orjson.dumps([line, reason]) + b"\n")
        self.rejected += 1

    def finish(self, **known: object) -> PieceSummary:
        """Write what is left; ``known`` are the fields of the summary that only the caller knows."""
        lengths = np.concatenate([*self._lengths, np.zeros(0, np.int64)]).astype("<i8")
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
            for rows in self._rows:
                writer.write_batch(rows)
        parts = [lengths.tobytes(), sink.getbuffer(), self._rejects.getbuffer()]
        for part in parts:
            self._stream.write(part)
        sizes = (self.tokens * self._dtype.itemsize, *map(len, parts))
        summary = PieceSummary(
            documents=len(lengths),
            tokens=self.tokens,
            rejected=self.rejected,
            text_bytes=self.text_bytes,
            sizes=sizes,
            **known,
        )
        footer = orjson.dumps(asdict(summary))
        self._stream.write(footer + TAIL.pack(len(footer), MAGIC))
        return summary


def write_piece(path: str, dtype: np.dtype, fill) -> PieceSummary:
    """Make a piece file; ``fill(writer)`` adds the documents and returns the summary."""
    with atomic_file(path) as stream:
        return fill(PieceWriter(stream, dtype))


def read_summary(path: str) -> PieceSummary | None:
    """The summary of a piece file; None where the file is not whole, as after the loss of a disk's cache."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        if size < TAIL.size:
            return None
        stream.seek(size - TAIL.size)
        length, magic = TAIL.unpack(stream.read(TAIL.size))
        if magic != MAGIC or length > size - TAIL.size:
            return None
        stream.seek(size - TAIL.size - length)
        fields = orjson.loads(stream.read(length))
    summary = PieceSummary(**{**fields, "sizes": tuple(fields["sizes"])})
    return summary if sum(summary.sizes) + length + TAIL.size == size else None


class PieceReader:
    """The parts of a piece file; the tokens stay where they are, at the file's beginning."""

    def __init__(self, path: str, summary: PieceSummary) -> None:
        self.path, self.summary = path, summary

    def _part(self, number: int) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(sum(self.summary.sizes[:number]))
            return stream.read(self.summary.sizes[number])

    def lengths(self) -> np.ndarray:
        """int64[documents] in tokens."""
        return np.frombuffer(self._part(1), "<i8")

    def rows(self) -> pa.Table:
        """Provenance rows, lines counted from 1 in the piece; none if they are not kept."""
        return pa.ipc.open_stream(self._part(2)).read_all()

    def rejects(self) -> list[tuple[int, str]]:
        """(line, reason) of what was set aside, lines counted from 1 in the piece."""
        return [tuple(orjson.loads(line)) for line in self._part(3).splitlines()]
