"""Scores from a file, made by anything: one number per unit of the corpus, of which each round takes its shard's.

A ``.npy`` file holds float [units]; of ``.parquet`` and ``.csv`` files a column is taken. Nothing is unpickled. Where a
``.json`` of the same name lies beside the file (``scores.json`` beside ``scores.npy``, as a run leaves them) and has a
``corpus_digest``, that has to be the corpus's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.inputs import Inputs, Scores


@dataclass(frozen=True)
class ExternalConfig:
    """The arm external: scores from a file."""

    scores: str = ""
    """File of one score per unit of data.train_prefix, in its order; higher is better: .npy, .parquet or .csv."""
    column: str = ""
    """Column of a .parquet or .csv file that holds the scores (not needed where there is only one)."""


def scores(options: ExternalConfig, inputs: Inputs) -> Scores:
    """Those of the shard's units."""
    from megatron_bliss.base.files import sha256_file
    from megatron_bliss.base.parallel import failing_together
    from megatron_bliss.data.subset import units_within

    found = Scores(None)
    with failing_together(inputs.groups):
        if inputs.groups.is_main:
            units = units_within(inputs.source.corpus.prefix, inputs.train_prefix)
            values = read_scores(options, inputs.train_prefix)[units]
            found = Scores(values, {"method": "external", **asdict(options), "sha256": sha256_file(options.scores)})
    return found


def read_scores(options: ExternalConfig, train_prefix: str) -> np.ndarray:
    """The file's scores, float32, one finite number per unit of the corpus; ValueError for anything else."""
    from megatron_bliss.data.manifest import read_manifest

    path, units = Path(options.scores), read_manifest(train_prefix)["counts"]["units"]
    if not path.is_file():
        raise ValueError(
            f"found baselines.external.scores {options.scores!r}, expected a file with one score per unit of "
            f"{train_prefix}"
        )
    _check_corpus(path, train_prefix)
    values = _READERS[path.suffix](path, options.column) if path.suffix in _READERS else None
    if values is None:
        raise ValueError(f"found baselines.external.scores {path}, expected a file of {', '.join(_READERS)}")
    if values.dtype.kind not in "fiu" or values.shape != (units,):
        raise ValueError(
            f"found {values.dtype}{list(values.shape)} in {path}, expected {units} numbers, one per unit of "
            f"{train_prefix}: change baselines.external.scores or baselines.external.column"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is told below
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))
        raise ValueError(
            f"found {len(bad)} of {units} scores in {path} that are no finite float32 (unit {bad[0]} is the first), "
            "expected numbers: give units without a score a low one"
        )
    return values


def check(options: ExternalConfig, train_prefix: str) -> None:
    """Refuse a file that a round could not use."""
    read_scores(options, train_prefix)


def _check_corpus(path: Path, train_prefix: str) -> None:
    """Scores that say which corpus they are of have to be of this one."""
    from megatron_bliss.base.files import read_json
    from megatron_bliss.data.manifest import corpus_digest

    beside = path.with_suffix(".json")
    found = read_json(beside).get("corpus_digest") if beside.is_file() else None
    if found is not None and found != corpus_digest(train_prefix):
        raise ValueError(
            f"found scores of corpus {str(found)[:12]} in {path}, as {beside.name} says, expected those of "
            f"{train_prefix} ({corpus_digest(train_prefix)[:12]}): change baselines.external.scores"
        )


def _read_npy(path: Path, column: str) -> np.ndarray:
    if column:
        raise ValueError(f"found baselines.external.column {column!r}, expected none for {path}, which has no columns")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"found {path} ({error}), expected a .npy file of numbers") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"found an archive of arrays in {path}, expected one array: save it by numpy.save")
    return found


def _read_parquet(path: Path, column: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        name = _column(path, pq.read_schema(path).names, column)
        return pq.read_table(path, columns=[name]).column(0).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"found {path} ({error}), expected a parquet file") from error


def _read_csv(path: Path, column: str) -> np.ndarray:
    import pyarrow as pa
    from pyarrow import csv

    try:
        with csv.open_csv(path) as reader:
            name = _column(path, reader.schema.names, column)
        return csv.read_csv(path, convert_options=csv.ConvertOptions(include_columns=[name])).column(0).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"found {path} ({error}), expected a CSV file with a line of column names") from error


def _column(path: Path, names: list[str], column: str) -> str:
    """The column to read: the one asked for, or the only one."""
    if column in names or not column and len(names) == 1:
        return column or names[0]
    raise ValueError(f"found baselines.external.column {column!r}, expected one of {', '.join(names)}, as {path} has")


_READERS = {".npy": _read_npy, ".parquet": _read_parquet, ".csv": _read_csv}

ARM = Arm("numbers from a file, made by whatever you like", scores, settings=ExternalConfig, check=check)
