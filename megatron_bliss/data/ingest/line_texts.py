"""Texts of some lines of a source file, by their numbers: how a document that was read before is found again.

Lines are counted as preprocessing counts them (from 1, blank and broken ones, too; rows of a parquet file), and a text
is what preprocessing makes of its line. Only the lines asked for are parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import pyarrow.parquet as pq

from megatron_bliss.data.ingest.documents import BadLine, parse_line, plain_text, record_text
from megatron_bliss.data.ingest.lines import LineReader
from megatron_bliss.data.ingest.parquet import DAMAGE, batch_rows, group_batches
from megatron_bliss.data.ingest.sources import BLOCK_BYTES, file_kind

WHOLE_FILE = 1 << 62


class LostText(ValueError):
    """A line of a source file that has no text, or none any more."""


def line_texts(
    path: str, keys: Sequence[str], lines: Iterable[int], *, block_bytes: int = BLOCK_BYTES
) -> Iterator[str]:
    """The text of each of ``lines``, increasing numbers of lines of a file of any kind that preprocessing reads.

    The file is read once, front to back, and no further than to the last line (row groups of a parquet file without
    such a line are skipped). ``lines`` are taken one at a time, each when the text before it has been used, so they may
    come from a generator. keys: of JSON lines, and columns of parquet files; several are joined by a newline. Memory:
    one block of text, or the longest line. Raises :class:`LostText` for a line that is not there or has no text,
    ValueError for numbers that do not increase, a column that is not there or a file of another kind.
    """
    kind = file_kind(path)
    if kind not in _READERS:
        raise ValueError(f"found {path}, expected a file of {', '.join(_READERS)}: give one of these")
    reader, last = _READERS[kind](path, list(keys), block_bytes), 0
    try:
        for line in lines:
            if line <= last:
                raise ValueError(f"found line {line} of {path} after line {last}, expected increasing numbers from 1")
            try:
                yield reader.text(line)
            except BadLine as error:
                raise LostText(
                    f"found no text at line {line} of {path} ({error}), expected the one that was read before: put "
                    "that file back, or change --export-text"
                ) from error
            last = line
    finally:
        reader.close()


class _Lines:
    """A file of lines; ``parse`` makes a text of one."""

    def __init__(self, path: str, keys: list[str], block_bytes: int, parse: Callable[[bytes, list[str]], str]) -> None:
        self._keys, self._parse, self._reader = keys, parse, LineReader(path)
        self._blocks = self._reader.blocks(0, WHOLE_FILE, block_bytes)
        self._first = self._end = 1
        self._lines: list[bytes] | None = None
        self._block = None

    def text(self, line: int) -> str:
        """The text of a line that is not before the last one. Raises BadLine."""
        while line >= self._end:
            self._block, self._lines = next(self._blocks, None), None
            if self._block is None:
                raise BadLine(self._reader.damage or f"the file has {self._end - 1} lines")
            data, self._first = self._block.data, self._end
            self._end += 1 if self._block.problem else data.count(b"\n") + (not data.endswith(b"\n"))
        if self._block.problem:
            raise BadLine(self._block.problem)
        if self._lines is None:
            self._lines = self._block.data.split(b"\n")
        return self._parse(self._lines[line - self._first], self._keys)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


class _Rows:
    """A parquet file."""

    def __init__(self, path: str, keys: list[str], block_bytes: int) -> None:
        self._keys, self._block_bytes = keys, block_bytes
        try:
            self._file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise LostText(f"found {path} ({error}), expected a parquet file: put it back") from error
        missing = [key for key in keys if key not in self._file.schema_arrow.names]
        if missing:
            names = ", ".join(self._file.schema_arrow.names)
            raise ValueError(f"{path} has no column {missing[0]!r}, expected one of {names}: change --json-keys")
        self._group, self._group_end = -1, 1  # the row group that is read, and the first row after it
        self._first = self._end = 1
        self._batches, self._batch = iter(()), None

    def text(self, line: int) -> str:
        """The text of a row that is not before the last one. Raises BadLine."""
        try:
            self._go_to(line)
            (row,) = batch_rows(self._batch.slice(line - self._first, 1))
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadLine(f"damaged parquet file: {error}") from error
        if isinstance(row, BadLine):
            raise row
        return record_text(row, self._keys)

    def _go_to(self, line: int) -> None:
        metadata = self._file.metadata
        if line >= self._group_end:
            while line >= self._group_end:
                self._group += 1
                if self._group == metadata.num_row_groups:
                    raise BadLine(f"the file has {self._group_end - 1} rows")
                self._end, self._group_end = self._group_end, self._group_end + metadata.row_group(self._group).num_rows
            self._batches = group_batches(self._file, self._group, self._keys, self._block_bytes)
        while line >= self._end:
            self._batch = next(self._batches)
            self._first, self._end = self._end, self._end + len(self._batch)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _json_text(line: bytes, keys: list[str]) -> str:
    return parse_line(line, keys)[0]


def _plain_text(line: bytes, keys: list[str]) -> str:
    if not line or line.isspace():
        raise BadLine("a blank line")
    return plain_text(line)


_READERS = {
    ".jsonl": partial(_Lines, parse=_json_text),
    ".json": partial(_Lines, parse=_json_text),
    ".txt": partial(_Lines, parse=_plain_text),
    ".parquet": _Rows,
}
