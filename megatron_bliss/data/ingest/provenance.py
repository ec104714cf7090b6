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
    return tuple(value if value is None or type(value) is str else _text(value) for value in values)


def _text(value: object) -> str:
    """A value that is no string, as JSON; what JSON has no form for (columns of parquet files), as Python prints it."""
    try:
        return orjson.dumps(value, default=str).decode()
    except (TypeError, OverflowError):  # a number of more than 64 bits; values in each other
        return str(value)


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
