"""The text of evaluation files: all strings of each record, whatever their shape."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import orjson
import pyarrow.parquet as pq

from megatron_bliss.data.ingest.documents import numbered_lines
from megatron_bliss.data.ingest.lines import UTF8_MARK
from megatron_bliss.data.ingest.parquet import DAMAGE
from megatron_bliss.data.ingest.sources import file_kind
from megatron_bliss.data.ingest.streams import ByteStream, DamagedSource

ROWS_AT_ONCE = 1024


def read_records(path: str, keys: Collection[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """(line, strings) of every record of a file, also of those without a string.

    A record is a JSON line, an item of a file that is one JSON list, a line of plain text that is not blank, or a row
    of a table; ``line`` is its number from 1. keys: only strings under one of these names, at any depth; none: all.
    Raises ValueError for a file that cannot be read to its end. Memory: the file.
    """
    kind = file_kind(path)
    if kind == ".parquet":
        records = _rows(path)
    elif kind == ".txt":
        records = ((line, _plain(path, line, data)) for line, data in numbered_lines(_content(path), 1))
        keys = ()
    else:
        records = _json_records(path)
    for line, record in records:
        yield line, strings_of(record, keys)


def strings_of(record: object, keys: Collection[str] = ()) -> list[str]:
    """All strings in nested lists and dicts, in order; with ``keys`` only those under one of these names."""
    found, left = [], [(record, not keys)]
    while left:
        value, wanted = left.pop()
        if isinstance(value, dict):
            left += [(part, wanted or name in keys) for name, part in reversed(value.items())]
        elif isinstance(value, list | tuple):
            left += [(part, wanted) for part in reversed(value)]
        elif wanted and isinstance(value, str):
            found.append(value)
        elif wanted and isinstance(value, bytes):  # a table's text may be stored as such; a picture is no UTF-8
            found += _decoded(value)
    return found


def _decoded(value: bytes) -> list[str]:
    try:
        return [value.decode("utf-8")]
    except UnicodeDecodeError:
        return []


def _content(path: str) -> bytes:
    stream = ByteStream(path)
    try:
        return b"".join(iter(stream.read, b"")).removeprefix(UTF8_MARK)
    except DamagedSource as error:
        raise _unreadable(path, str(error)) from error
    finally:
        stream.close()


def _json_records(path: str) -> Iterator[tuple[int, object]]:
    """Of JSON lines; or of one JSON value, whose items are the records if it is a list."""
    content = _content(path)
    lines = list(numbered_lines(content, 1))
    try:
        records = [(line, orjson.loads(data)) for line, data in lines]
    except orjson.JSONDecodeError:
        records = []
    if len(records) > 1 or not lines:
        return iter(records)
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise _broken_line(path, lines) from None
    return enumerate(value, 1) if isinstance(value, list) else iter([(lines[0][0], value)])


def _broken_line(path: str, lines: list[tuple[int, bytes]]) -> ValueError:
    for line, data in lines:
        try:
            orjson.loads(data)
        except orjson.JSONDecodeError as error:
            return ValueError(
                f"found {path}, line {line}: broken JSON ({error}), expected JSON lines or one JSON value: "
                "mend the line or change --evaluation"
            )
    raise AssertionError("every line can be read")


def _plain(path: str, line: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"found {path}, line {line}: invalid UTF-8 at byte {error.start}, expected text: "
            "mend the line or change --evaluation"
        ) from error


def _rows(path: str) -> Iterator[tuple[int, dict]]:
    try:
        with pq.ParquetFile(path) as file:
            row = 1
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from enumerate(batch.to_pylist(), row)
                row += len(batch)
    except (*DAMAGE, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the content's
        raise _unreadable(path, f"damaged parquet file: {error}") from error


def _unreadable(path: str, problem: str) -> ValueError:
    text = " ".join(problem.split())
    return ValueError(f"found {path}: {text}, expected a whole file: make {os.path.basename(path)} again")
