"""``X.provenance.parquet``: where each unit comes from, one row per unit."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

FIELDS = ("url", "domain", "format", "label")
SCHEMA = pa.schema([("file", pa.string()), ("line", pa.int64()), *((name, pa.string()) for name in FIELDS)])
ROW_SCHEMA = pa.schema(list(SCHEMA)[1:])
ROW_GROUP = 1 << 17


def field_values(record: dict) -> tuple[str | None, ...]:
    """url, domain, format and label of a record, from the top level or its ``meta``/``metadata``; None where absent."""
    nested = [part for part in (record.get("meta"), record.get("metadata")) if type(part) is dict]
    if not nested:  # the usual case, on the path of every document
        values = (record.get("url"), record.get("domain"), record.get("format"), record.get("label"))
    else:
        values = (next((part[name] for part in (record, *nested) if name in part), None) for name in FIELDS)
    return tuple(value if value is None or type(value) is str else orjson.dumps(value).decode() for value in values)


def document_rows(lines: Sequence[int], values: Sequence[tuple[str | None, ...]]) -> pa.RecordBatch:
    """Rows for documents of one file, without its name: line numbers and :func:`field_values`."""
    columns = list(zip(*values, strict=True)) or [()] * len(FIELDS)
    arrays = [pa.array(lines, pa.int64()), *(pa.array(column, pa.string()) for column in columns)]
    return pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA)


def with_file(rows: pa.Table, file: str, lines_before: int) -> pa.Table:
    """Rows of a part of ``file`` with its name, and lines counted from the file's first one."""
    lines = pa.array(rows.column("line").to_numpy() + lines_before, pa.int64())
    names = pa.DictionaryArray.from_arrays(np.zeros(len(rows), np.int32), pa.array([file])).cast(pa.string())
    return pa.Table.from_arrays([names, lines, *(rows.column(name) for name in FIELDS)], schema=SCHEMA)


class ProvenanceWriter:
    """Streams rows into a parquet file; whoever asked for it gives it its final name. Constant memory."""

    def __init__(self, path: str) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115 - lives as long as the writer
        self._writer = pq.ParquetWriter(self._stream, SCHEMA, compression="zstd")
        self._pending: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Append one row per unit."""
        while self._rows + len(table) >= ROW_GROUP:  # row groups do not depend on how the rows come in
            taken = ROW_GROUP - self._rows
            self._pending.append(table.slice(0, taken))
            table = table.slice(taken)
            self._flush()
        if len(table):
            self._pending.append(table)
            self._rows += len(table)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending).combine_chunks())
        self._pending, self._rows = [], 0

    def finish(self) -> None:
        """Complete the file and flush it to disk."""
        self._flush()
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


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
