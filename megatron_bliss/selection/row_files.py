"""Files of rows, written as they come: JSON lines, plain or compressed, and parquet."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from megatron_bliss.base.files import atomic_file

try:
    from isal import igzip
except ImportError:  # no wheel for every platform; Python's own writer is several times slower
    igzip = None

Rows = pa.Table | pa.RecordBatch
ROW_GROUP_BYTES = 64 << 20
ROW_GROUP_ROWS = 1 << 17


def export_rows(path: str | os.PathLike, rows: Iterable[Rows]) -> int:
    """Write rows to a file of the kind that its suffix says; returns how many they were.

    rows: tables or batches of one schema. JSON lines leave out fields that are null. The file appears under its name
    when it is complete, and not at all after an error. Memory: a table, and for parquet a row group of at most about
    ``ROW_GROUP_BYTES``. Raises ValueError for an unknown suffix, and where there is no row at all.
    """
    suffix = check_row_file(path)
    rows = iter(rows)
    first = next((part for part in rows if len(part)), None)
    if first is None:
        raise ValueError(f"found no row for {path}, expected at least one: choose more units")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        return _WRITERS[suffix](stream, first.schema, itertools.chain([first], rows))


def check_row_file(path: str | os.PathLike) -> str:
    """The suffix of a file that rows can be written to; ValueError for another one."""
    if Path(path).is_dir():
        raise ValueError(f"found a folder at {path}, expected the name of a file: change --export")
    for suffix in _WRITERS:
        if Path(path).name.endswith(suffix) and Path(path).name != suffix:
            return suffix
    raise ValueError(f"found {path}, expected a name with one of {', '.join(_WRITERS)}: change --export")


def _write_lines(open_stream: Callable[[IO[bytes]], contextlib.AbstractContextManager]) -> Callable:
    def write(stream: IO[bytes], schema: pa.Schema, rows: Iterable[Rows]) -> int:
        count = 0
        with open_stream(stream) as out:
            for part in rows:
                lines = [
                    orjson.dumps({name: value for name, value in row.items() if value is not None}, option=NEW_LINE)
                    for row in part.to_pylist()
                ]
                out.write(b"".join(lines))
                count += len(lines)
        return count

    return write


NEW_LINE = orjson.OPT_APPEND_NEWLINE


def _gzip(stream: IO[bytes]) -> contextlib.AbstractContextManager:
    """The same rows give the same bytes: neither name nor time is written."""
    if igzip is None:
        return gzip.GzipFile("", "wb", 6, stream, mtime=0)
    return igzip.IGzipFile("", "wb", 2, stream, mtime=0)


def _zstandard(stream: IO[bytes]) -> contextlib.AbstractContextManager:
    return zstandard.ZstdCompressor().stream_writer(stream, closefd=False)


def _write_parquet(stream: IO[bytes], schema: pa.Schema, rows: Iterable[Rows]) -> int:
    count = 0
    with pq.ParquetWriter(stream, schema, compression="zstd") as out:
        for group in _groups(rows):
            out.write_table(group, row_group_size=len(group))
            count += len(group)
    return count


def _groups(rows: Iterable[Rows]) -> Iterator[pa.Table]:
    """Rows joined into tables of at least ``ROW_GROUP_BYTES`` or ``ROW_GROUP_ROWS``, but the last."""
    waiting, size, count = [], 0, 0
    for part in rows:
        table = part if isinstance(part, pa.Table) else pa.Table.from_batches([part])
        waiting.append(table)
        size, count = size + table.nbytes, count + len(table)
        if size >= ROW_GROUP_BYTES or count >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting, size, count = [], 0, 0
    if count:
        yield pa.concat_tables(waiting)


_WRITERS = {
    ".jsonl": _write_lines(contextlib.nullcontext),
    ".jsonl.gz": _write_lines(_gzip),
    ".jsonl.zst": _write_lines(_zstandard),
    ".parquet": _write_parquet,
}
