"""Reading ``X.provenance.parquet``: where each unit of a corpus or of one of its subsets comes from."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.data.subset import root_prefix, root_units


class FieldWithoutValues(ValueError):
    """No unit has a value in this column of the provenance."""


def open_provenance(path: str, **options: object) -> pq.ParquetFile:
    """A provenance file; ValueError that names it when it is damaged."""
    try:
        return pq.ParquetFile(path, **options)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a usable provenance file ({error}); remove it, or make the corpus again"
        ) from error


def read_provenance(
    prefix: str | os.PathLike, ids: np.ndarray | None = None, columns: list[str] | None = None
) -> pa.Table:
    """Where units come from: one row per unit, in the order of ``ids`` (None: all units of ``prefix``).

    Columns: file, line, and what the source had of url, domain, format, label. Memory: what is asked for, plus one row
    group. Raises ValueError when the root corpus has no provenance file.
    """
    path = provenance_path(prefix)
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} does not exist; only corpora made by tools/preprocess_data.py know where text came from"
        )
    return read_rows(path, root_units(prefix, ids), columns)


def provenance_path(prefix: str | os.PathLike) -> str:
    """The provenance file of a corpus's root, which need not be there."""
    return f"{root_prefix(prefix)}.provenance.parquet"


def read_rows(path: str, rows: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Rows int64[k], in any order, of a provenance file; ValueError for a damaged file or rows it does not have."""
    order = np.argsort(rows, kind="stable")
    wanted, start, parts = rows[order], 0, []
    with open_provenance(path) as file:
        schema = (
            file.schema_arrow if columns is None else pa.schema([file.schema_arrow.field(name) for name in columns])
        )
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(wanted, [start, stop])
            if first < last:
                parts.append(file.read_row_group(group, columns=columns).take(wanted[first:last] - start))
            start = stop
    table = pa.concat_tables([*parts, schema.empty_table()])
    if len(table) != len(rows):
        raise ValueError(f"{path} has {start} rows, but unit {wanted[-1]} was asked for: it is of another corpus")
    return table.take(np.argsort(order, kind="stable"))


def require_field(prefix: str | os.PathLike, field: str) -> str:
    """The provenance file of a corpus's root; ValueError when there is none or it has no such column."""
    path = provenance_path(prefix)
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} does not exist, so no unit's {field} is known: make the corpus with tools/preprocess_data.py"
        )
    require_column(path, field)
    return path


def require_column(path: str, field: str) -> None:
    """ValueError where a provenance file has no such column."""
    with open_provenance(path) as file:
        if field not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column {field!r}, expected one of {', '.join(file.schema_arrow.names)}")


def provenance_codes(prefix: str | os.PathLike, field: str) -> tuple[np.ndarray, list[str]]:
    """A provenance column as numbers: (codes int32[units], names), "unknown" for units without a value.

    Memory: 4 bytes per unit of the root corpus. Raises ValueError when no unit has a value.
    """
    codes, names = column_codes(require_field(prefix, field), field, str(prefix))
    units = root_units(prefix)
    return (codes if len(units) == len(codes) else codes[units]), names


def column_codes(path: str, field: str, name: str) -> tuple[np.ndarray, list[str]]:
    """A column of a provenance file as numbers, as :func:`provenance_codes`, for all its rows; name: of the corpus."""
    numbers: dict[str | None, int] = {}
    parts = [np.zeros(0, np.int32)]
    with open_provenance(path, read_dictionary=[field]) as file:
        for group in range(file.num_row_groups):
            for chunk in file.read_row_group(group, columns=[field]).column(0).chunks:
                known = [numbers.setdefault(value, len(numbers)) for value in chunk.dictionary.to_pylist()]
                if chunk.null_count:
                    known.append(numbers.setdefault(None, len(numbers)))
                local = chunk.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)
                parts.append(np.array(known, dtype=np.int32)[local])
    if not set(numbers) - {None}:
        raise FieldWithoutValues(f"no unit of {name} has a {field}: the source text has no such field")
    return np.concatenate(parts), ["unknown" if value is None else value for value in numbers]
