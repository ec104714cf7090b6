"""Parquet files as documents, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.data.ingest.documents import BadLine, Documents, row_documents
from megatron_bliss.data.ingest.provenance import FIELDS

NESTED = ("meta", "metadata")
MAX_BATCH_ROWS = 8192
DAMAGE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowIndexError, OSError, EOFError)


class ParquetReader:
    """Reads one file by pieces of whole row groups; rows are its lines, counted from 1 over the file.

    Memory: a batch of rows of about ``block_bytes`` and what Arrow keeps of a row group's pages.
    """

    def __init__(self, path: str, keys: Sequence[str], piece_bytes: int, block_bytes: int) -> None:
        self.path, self.keys, self.block_bytes = path, list(keys), block_bytes
        self.damage, self.file_bytes = None, 0
        try:
            self._file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the content's
            self._file, self.damage = None, f"damaged parquet file, nothing of it can be read: {error}"
        self._groups = self._plan(piece_bytes) if self._file else [[]]
        self._columns = self._wanted_columns() if self._file else []

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return len(self._groups)

    def _plan(self, piece_bytes: int) -> list[list[int]]:
        metadata, groups, size = self._file.metadata, [[]], 0
        for group in range(metadata.num_row_groups):
            if size >= piece_bytes:
                groups.append([])
                size = 0
            groups[-1].append(group)
            size += metadata.row_group(group).total_byte_size
        return groups

    def _wanted_columns(self) -> list[str]:
        names = self._file.schema_arrow.names
        missing = [key for key in self.keys if key not in names]
        if missing:
            raise ValueError(
                f"{self.path} has no column {missing[0]!r}, expected one of {', '.join(names)}: change --json-keys"
            )
        return [name for name in names if name in (*self.keys, *FIELDS, *NESTED)]

    def documents(self, piece: int) -> Iterator[tuple[Documents, int]]:
        """Documents of one piece and the rows they were; row numbers count from 1 in the piece."""
        if self._file is None:
            yield Documents(rejects=[(1, self.damage)]), 0
            return
        row = 1
        for group in self._groups[piece]:
            rows = self._file.metadata.row_group(group).num_rows
            end = row + rows
            try:
                for batch in self._batches(group):
                    yield row_documents(batch_rows(batch), row, self.keys), len(batch)
                    row += len(batch)
            except DAMAGE as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self.damage = f"damaged parquet file, {end - row} rows of row group {group} cannot be read: {error}"
                yield Documents(rejects=[(lost, self.damage) for lost in range(row, end)]), end - row
                row = end

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        return group_batches(self._file, group, self._columns, self.block_bytes)

    def at_end(self, piece: int) -> bool:
        """Whether no piece follows this one."""
        return piece + 1 >= self.pieces

    def finish(self) -> None:
        """Its digest is not known: a parquet file is not read from front to back."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def group_batches(
    file: pq.ParquetFile, group: int, columns: Sequence[str], block_bytes: int
) -> Iterator[pa.RecordBatch]:
    """Rows of a row group in batches of about ``block_bytes``."""
    found = file.metadata.row_group(group)
    rows = max(1, min(MAX_BATCH_ROWS, block_bytes * found.num_rows // max(found.total_byte_size, 1)))
    return file.iter_batches(rows, row_groups=[group], columns=columns)


def batch_rows(batch: pa.RecordBatch) -> list[dict | BadLine]:
    """The rows of a batch as dicts; strings that are no UTF-8 spoil their row alone."""
    columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    names = list(columns)
    rows: list[dict | BadLine] = []
    for values in zip(*columns.values(), strict=True):
        wrong = next((value for value in values if isinstance(value, BadLine)), None)
        rows.append(wrong or dict(zip(names, values, strict=True)))
    return rows


def _values(column: pa.Array) -> list:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text(column.type):
        return column.to_pylist()
    try:
        return column.cast(pa.large_string()).to_pylist()  # checks binary, but takes strings as they are
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return [_text(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
                                             pa.types.is_large_binary))  # fmt: skip


def _text(value: bytes | None) -> str | BadLine | None:
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadLine(f"invalid UTF-8 at byte {error.start}")
