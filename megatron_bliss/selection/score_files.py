"""Scores in files made by anything: one number per unit, in corpus order, or beside the file and line it is for.

Nothing is unpickled, and nothing is allocated by what a header claims before that was held against the file.
"""

from __future__ import annotations

import os
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_bliss.base.files import read_json
from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.data.manifest import corpus_digest
from megatron_bliss.data.provenance import provenance_codes, read_provenance
from megatron_bliss.selection.score_tables import NAME, NUMBER, TABLES, WHOLE, Columns, has_column, table_kind

NPY_ERRORS = (ValueError, OSError, EOFError, OverflowError, TypeError, SyntaxError, tokenize.TokenError)
"""What numpy raises for files that are none of its own."""
NAMED = 3
"""Units without a score that a message names."""


@dataclass(frozen=True)
class Options:
    """How messages call the options that give a file and its column."""

    file: str = "--scores"
    column: str = "--column"
    id_columns: str = "--id-columns"


TOOL = Options()


def read_scores_column(
    path: str | os.PathLike, column: str, units: int, *, of: str = "the corpus", options: Options = TOOL
) -> np.ndarray:
    """The file's scores in corpus order: float32[units], all finite.

    path: ``.npy`` of numbers [units] (column is ""), or ``.parquet``, ``.csv`` or ``.jsonl``, the last two also ``.gz``
    or ``.zst``, of which a column is taken ("": the only one; ``a.b`` in JSON lines: key b inside of key a). of: name
    of the corpus, for messages. Raises ValueError, in one line, for too few or too many scores and for anything that is
    no such file. Memory: about 12 bytes per unit.
    """
    path = _existing(path, of, options)
    if path.endswith(".npy"):
        if column:
            raise ValueError(f"found {options.column} {column!r}, expected none for {path}, which has no columns")
        values = load_npy(path)
        found = f"{values.dtype}{list(values.shape)}"
    else:
        kind = table_kind(path)
        rows = _told(path, kind.count)
        if rows not in (None, units):
            raise _not_one_each(f"{rows} rows", path, units, of, options)
        name = _column(path, column, options.column)
        array = _told(path, kind.read, {name: NUMBER}).column(0)
        values, found = _numbers(array), f"{array.type}[{len(array)}]"
    if values is None:
        raise ValueError(f"found {found} in column {name} of {path}, expected numbers: change {options.column}")
    if values.dtype.kind not in "fiu" or values.shape != (units,):
        raise _not_one_each(found, path, units, of, options)
    return _finite(values, path)


def read_matched_scores(
    path: str | os.PathLike,
    column: str,
    prefix: str | os.PathLike,
    id_columns: tuple[str, str] = ("file", "line"),
    *,
    options: Options = TOOL,
) -> np.ndarray:
    """Scores float32[units] of a corpus or subset, each from the row of the file that names the unit's source.

    id_columns: columns of the file that hold what the corpus's provenance has as file (the same string) and as line.
    Rows may be in any order, and rows of no unit are left out. A window has the score of the document it begins in.
    Raises ValueError, in one line, where a unit has no row or several (the first few are named), and as
    :func:`read_scores_column` does. Memory: about 50 bytes per unit and per row.
    """
    path = _existing(path, str(prefix), options)
    if path.endswith(".npy"):
        raise ValueError(f"found {options.id_columns} for {path}, which has no columns, expected none")
    names = [_column(path, column, options.column), *(_column(path, one, options.id_columns) for one in id_columns)]
    if len(set(names)) < 3:
        raise ValueError(
            f"found columns {', '.join(names)} for score, file and line, expected three: change {options.column} or "
            f"{options.id_columns}"
        )
    columns: Columns = dict(zip(names, (NUMBER, NAME, WHOLE), strict=True))
    table = _told(path, table_kind(path).read, columns)
    values = _numbers(table.column(0))
    if values is None:
        raise ValueError(f"found {table.column(0).type} in {path}, expected numbers: change {options.column}")
    places = _Places(prefix)
    rows = _matches(places.of_rows(table.column(1), table.column(2)), places, path, options)
    return _finite(values[rows], path)


def check_belongs(path: str | os.PathLike, prefix: str | os.PathLike, options: Options = TOOL) -> None:
    """ValueError where a ``.json`` of the same name beside a file of scores says that they are of another corpus."""
    if not os.path.isfile(path):
        return
    beside = Path(path).with_suffix(".json")
    found = read_json(beside).get("corpus_digest") if beside.is_file() else None
    if found is not None and found != corpus_digest(prefix):
        raise ValueError(
            f"found scores of corpus {str(found)[:12]} in {path}, as {beside.name} says, expected those of "
            f"{prefix} ({corpus_digest(prefix)[:12]}): change {options.file}"
        )


def load_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a ``.npy`` file, mapped; ValueError for anything else, objects among it."""
    try:
        with np.errstate(over="ignore"):  # a header can claim more than can be counted
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        raise ValueError(
            f"found {path} ({_line(error)}), expected a .npy file of numbers: make the scores again"
        ) from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"found an archive of arrays in {path}, expected one array: save it by numpy.save")
    return found


def load_unit_scores(path: str | os.PathLike, prefix: str | os.PathLike) -> np.ndarray:
    """Numbers [units] of a ``.npy`` that this program wrote for a corpus, in memory; ValueError for anything else."""
    scores = load_npy(path)
    if scores.shape != (len(IndexedCorpus(prefix)),) or scores.dtype.kind not in "fiu":
        raise ValueError(
            f"{path} has shape {list(scores.shape)} of {scores.dtype}, expected one number for each unit of {prefix}"
        )
    return np.array(scores)


class _Places:
    """Where the units of a corpus come from, as one number each: by file, then by line."""

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = prefix
        codes, self._files = provenance_codes(prefix, "file")
        lines = read_provenance(prefix, columns=["line"]).column(0).to_numpy()
        self._room = int(lines.max()) + 1
        self.of_units = codes.astype(np.int64) * self._room + lines

    def of_rows(self, files: pa.ChunkedArray, lines: pa.ChunkedArray) -> np.ndarray:
        """int64[rows]: the same number for the rows of a table; -1 for those that no unit comes from."""
        known = {name: code for code, name in enumerate(self._files)}
        parts = [np.zeros(0, dtype=np.int64)]
        for chunk in files.chunks:
            codes = np.array([known.get(name, -1) for name in chunk.dictionary.to_pylist()] + [-1], dtype=np.int64)
            parts.append(codes[chunk.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)])
        codes, numbers = np.concatenate(parts), lines.fill_null(-1).to_numpy()
        fits = (codes >= 0) & (numbers >= 0) & (numbers < self._room)
        return np.where(fits, codes * self._room + numbers, -1)

    def name(self, unit: int) -> str:
        """File and line of a unit."""
        file, line = divmod(int(self.of_units[unit]), self._room)
        return f"{self._files[file]}:{line}"


def _matches(keys: np.ndarray, places: _Places, path: str, options: Options) -> np.ndarray:
    """int64[units]: the one row of each unit; keys int64[rows]. ValueError where there is none or more than one."""
    order = np.argsort(keys, kind="stable")
    keys, units = keys[order], places.of_units
    rows, found = np.empty(len(units), dtype=np.int64), np.empty(len(units), dtype=np.int64)
    for part in blocks(len(rows)):
        rows[part] = np.searchsorted(keys, units[part], side="left")
        found[part] = np.searchsorted(keys, units[part], side="right") - rows[part]
    for wrong, what in ((found == 0, "no row"), (found > 1, "several rows")):
        if wrong.any():
            named = ", ".join(places.name(unit) for unit in np.flatnonzero(wrong)[:NAMED].tolist())
            raise ValueError(
                f"found {what} in {path} for {np.count_nonzero(wrong)} of {len(rows)} units of {places.prefix} (first: "
                f"{named}), expected one for each: change {options.file} or {options.id_columns}"
            )
    return order[rows]


def _existing(path: str | os.PathLike, of: str, options: Options) -> str:
    """The path of a file of a known kind."""
    if not os.path.isfile(path):
        raise ValueError(f"found {options.file} {str(path)!r}, expected a file with one score per unit of {of}")
    if not str(path).endswith(".npy") and table_kind(str(path)) is None:
        raise ValueError(f"found {options.file} {path}, expected a file of {', '.join(['.npy', *TABLES])}")
    return str(path)


def _told(path: str, read: Callable[..., Any], *arguments: object) -> Any:
    """What a reader returns of a file; its errors as one line that names the file."""
    try:
        return read(path, *arguments)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"found {path} ({_line(error)}), expected {table_kind(path).name}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _column(path: str, column: str, option: str) -> str:
    """The column to read: the one asked for, or the only one."""
    names = _told(path, table_kind(path).names)
    if not column and len(names) == 1:
        return names[0]
    if column and has_column(path, names, column):
        return column
    found = f"{option} {column!r}" if column else f"{len(names)} columns and no {option}"
    raise ValueError(f"found {found}, expected one of {', '.join(names)}, as {path} has")


def _numbers(array: pa.ChunkedArray) -> np.ndarray | None:
    """The numbers of a column, NaN for those that are not there; None where it has no numbers."""
    kind = array.type
    return array.to_numpy() if pa.types.is_floating(kind) or pa.types.is_integer(kind) else None


def _not_one_each(found: str, path: str, units: int, of: str, options: Options) -> ValueError:
    return ValueError(
        f"found {found} in {path}, expected {units} numbers, one per unit of {of}: change {options.file} or "
        f"{options.column}"
    )


def _finite(values: np.ndarray, path: str) -> np.ndarray:
    """float32; ValueError where one is not finite."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is told below
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))
        raise ValueError(
            f"found {len(bad)} of {len(values)} scores in {path} that are no finite float32 (unit {bad[0]} is the "
            "first), expected numbers: give units without a score a low one"
        )
    return values
