"""Columns of ``.parquet``, ``.csv`` and ``.jsonl`` files, the last two also compressed. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from megatron_bliss.data.ingest.sources import SourceState, read_blocks

NUMBER, WHOLE, NAME = pa.float64(), pa.int64(), pa.dictionary(pa.int32(), pa.string())
"""What a column can be asked to hold."""
Columns = dict[str, pa.DataType]


@dataclass(frozen=True)
class TableKind:
    """One kind of file."""

    name: str
    """For messages: "found X, expected NAME"."""
    names: Callable[[str], list[str]]
    """Names of a file's columns."""
    read: Callable[[str, Columns], pa.Table]
    """The columns asked for, in that order. Numbers of a parquet file have the type that they have there, if any."""
    count: Callable[[str], int | None] = lambda path: None
    """How many rows a file has, where that is known before it is read."""


def table_kind(path: str) -> TableKind | None:
    """The kind of a file by its suffix; None: no table."""
    return next((kind for suffix, kind in TABLES.items() if Path(path).name.endswith(suffix)), None)


def _parquet_columns(path: str, columns: Columns) -> pa.Table:
    names = [name for name, kind in columns.items() if kind == NAME]
    table = pq.read_table(path, columns=list(columns), read_dictionary=names).select(list(columns))
    for place, (name, kind) in enumerate(columns.items()):
        column = table.column(name)
        if kind == NAME and not pa.types.is_dictionary(column.type):
            table = table.set_column(place, name, column.cast(pa.string()).dictionary_encode())
        elif kind == WHOLE:
            table = table.set_column(place, name, column.cast(WHOLE))
    return table


def _csv_names(path: str) -> list[str]:
    with pa.csv.open_csv(path) as reader:
        return reader.schema.names


def _csv_columns(path: str, columns: Columns) -> pa.Table:
    options = pa.csv.ConvertOptions(include_columns=list(columns), column_types=columns)
    return pa.csv.read_csv(path, convert_options=options)


def _json_names(path: str) -> list[str]:
    for block in read_blocks(SourceState(path), block_bytes=1 << 16):
        if block.damage:
            raise ValueError(block.damage)
        for number, line in block.lines():
            return list(_record(line, number))
    return []


def _json_columns(path: str, columns: Columns) -> pa.Table:
    """Column ``a.b`` is the key b inside of a, where no key is called so."""
    schema, parts = pa.schema(list(columns.items())), []
    found: dict[str, list] = {name: [] for name in columns}
    for block in read_blocks(SourceState(path)):
        if block.damage:
            raise ValueError(block.damage)
        for number, line in block.lines():
            record = _record(line, number)
            for name, values in found.items():
                values.append(_value(record, name, columns[name], number))
        parts.append(pa.table(found, schema=schema))
        found = {name: [] for name in columns}
    return pa.concat_tables([*parts, schema.empty_table()])


def _record(line: bytes, number: int) -> dict:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"line {number} holds a {type(record).__name__} and no object")
    return record


_TYPES = {NUMBER: (float, int), WHOLE: (int,), NAME: (str,)}


def _value(record: dict, name: str, kind: pa.DataType, number: int) -> float | int | str:
    found: object = record
    for key in [name] if name in record else name.split("."):
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"line {number} has no {name!r}")
        found = found[key]
    if type(found) not in _TYPES[kind]:
        raise ValueError(f"line {number} has a {type(found).__name__} as {name!r}")
    return float(found) if kind == NUMBER else found


def has_column(path: str, names: list[str], column: str) -> bool:
    """Whether a file whose columns have these names may have this one: keys inside of keys show in each line alone."""
    return column in names or (TABLES[".jsonl"] is table_kind(path) and column.partition(".")[0] in names)


_CSV = TableKind("a CSV file with a line of column names", _csv_names, _csv_columns)
_JSON = TableKind("JSON lines", _json_names, _json_columns)
TABLES = {
    ".parquet": TableKind(
        "a parquet file",
        lambda path: pq.read_schema(path).names,
        _parquet_columns,
        lambda path: pq.read_metadata(path).num_rows,
    ),
    ".csv": _CSV,
    ".csv.gz": _CSV,
    ".csv.zst": _CSV,
    ".jsonl": _JSON,
    ".jsonl.gz": _JSON,
    ".jsonl.zst": _JSON,
}
