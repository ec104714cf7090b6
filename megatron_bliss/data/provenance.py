"""``X.provenance.parquet``: where each unit comes from, one row per unit."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.files import publish

FIELDS = ("url", "domain", "format", "label")
SCHEMA = pa.schema([("file", pa.string()), ("line", pa.int64()), *((name, pa.string()) for name in FIELDS)])
ROW_GROUP = 1 << 17


def field_values(record: dict) -> tuple[str | None, ...]:
    """url, domain, format and label of a record, from the top level or its ``meta``/``metadata``; None where absent."""
    nested = [part for part in (record.get("meta"), record.get("metadata")) if isinstance(part, dict)]
    return tuple(_as_text(next((part[name] for part in (record, *nested) if name in part), None)) for name in FIELDS)


def _as_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


def document_table(file: str, lines: Sequence[int], values: Sequence[tuple[str | None, ...]]) -> pa.Table:
    """Rows for documents of one file: their line numbers and :func:`field_values`."""
    columns = list(zip(*values, strict=True)) or [()] * len(FIELDS)
    arrays = [pa.array([file] * len(lines), pa.string()), pa.array(lines, pa.int64())]
    return pa.Table.from_arrays([*arrays, *(pa.array(column, pa.string()) for column in columns)], schema=SCHEMA)


class ProvenanceWriter:
    """Streams rows to a parquet file that appears under its name only when complete; constant memory."""

    def __init__(self, path: str) -> None:
        self.path, self._temporary = path, f"{path}.tmp"
        self._writer = pq.ParquetWriter(self._temporary, SCHEMA, compression="zstd")
        self._pending: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Append one row per unit."""
        self._pending.append(table)
        self._rows += len(table)
        if self._rows >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._pending).combine_chunks())
        self._pending, self._rows = [], 0

    def __enter__(self) -> ProvenanceWriter:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._flush()
        self._writer.close()
        if error_type is not None:
            os.unlink(self._temporary)
            return
        with open(self._temporary, "rb") as stream:
            os.fsync(stream.fileno())
        publish(self._temporary, self.path)


class WindowCutter:
    """Joins documents into one stream, cuts it into windows of ``length`` tokens, keeps each one's first document."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._tokens = np.zeros(0, dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int64)  # where each document of _rows begins, in tokens of _tokens
        self._rows = SCHEMA.empty_table()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, pa.Table]:
        """Append documents; returns (tokens, lengths, provenance rows) of the windows that are now full."""
        begins = np.cumsum(lengths) - lengths + len(self._tokens)
        self._tokens = np.concatenate([self._tokens, tokens])
        self._starts = np.concatenate([self._starts, begins])
        self._rows = pa.concat_tables([self._rows, rows])
        return self._cut(len(self._tokens) // self.length)

    def finish(self) -> tuple[np.ndarray, np.ndarray, pa.Table]:
        """The last, short window, if it has at least two tokens (one to see and one to predict)."""
        return self._cut(1) if len(self._tokens) >= 2 else self._cut(0)

    def _cut(self, windows: int) -> tuple[np.ndarray, np.ndarray, pa.Table]:
        firsts = np.arange(windows, dtype=np.int64) * self.length
        ends = np.minimum(firsts + self.length, len(self._tokens))
        used = int(ends[-1]) if windows else 0
        owners = np.searchsorted(self._starts, firsts, side="right") - 1
        cut = self._tokens[:used], ends - firsts, self._rows.take(owners)
        kept = max(int(np.searchsorted(self._starts, used, side="right")) - 1, 0)
        self._tokens, self._starts = self._tokens[used:], self._starts[kept:] - used
        self._rows = self._rows.slice(kept).combine_chunks()
        return cut
