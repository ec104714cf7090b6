"""Scores from files of other software: in corpus order, or by file and line; whatever is no such file is refused."""

from __future__ import annotations

import gzip
import json
import re
import struct
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_bliss.data.subset import write_subset
from megatron_bliss.selection.score_files import load_npy, load_unit_scores, read_matched_scores, read_scores_column
from tests.data.corpora import documents, write_corpus
from tests.data.ingest.source_files import make, write_source

SUFFIXES = (".npy", ".parquet", ".csv", ".csv.gz", ".csv.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst")
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress}


def write_table(path, columns):
    """Columns {name: list} in the kind of file that the name says; of a .npy file the first one."""
    kind, *compression = path.name.partition(".")[2].split(".")
    if kind == "npy":
        np.save(path, np.array(next(iter(columns.values()))))
    elif kind == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=7)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if kind == "jsonl":
            lines = [json.dumps(row) for row in rows]
        else:
            lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
        data = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(COMPRESS[compression[0]](data) if compression else data)
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_gives_its_column_in_order(tmp_path, suffix):
    for values in (np.random.default_rng(0).normal(size=30), np.arange(30)):  # whole numbers are numbers, too
        path = write_table(tmp_path / f"s{suffix}", {"quality": values.tolist(), "url": [f"u{i}" for i in range(30)]})
        found = read_scores_column(path, "" if suffix == ".npy" else "quality", 30)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.astype(np.float32))
        path = write_table(tmp_path / f"only{suffix}", {"quality": values.tolist()})
        np.testing.assert_array_equal(read_scores_column(path, "", 30), values.astype(np.float32))


def test_whole_numbers_first_and_keys_inside_of_keys(tmp_path):
    values = [*range(200_000), 0.5]  # beyond what is looked at to guess a type
    assert read_scores_column(write_table(tmp_path / "s.csv", {"s": values}), "s", len(values))[-1] == 0.5
    path = write_table(tmp_path / "s.jsonl", {"id": [1, 2], "metadata": [{"score": 1}, {"score": 2.5}]})
    assert read_scores_column(path, "metadata.score", 2).tolist() == [1, 2.5]
    path = write_table(tmp_path / "t.jsonl", {"a.b": [1, 2], "a": [{"b": 3}, {"b": 4}]})
    assert read_scores_column(path, "a.b", 2).tolist() == [1, 2]
    (tmp_path / "blank.jsonl").write_text('\n{"s": 1}\n  \n{"s": 2}')
    assert read_scores_column(tmp_path / "blank.jsonl", "s", 2).tolist() == [1, 2]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count", [0, 29, 31])
def test_too_few_and_too_many(tmp_path, suffix, count):
    path = write_table(tmp_path / f"s{suffix}", {"s": np.zeros(count).tolist()})
    if suffix == ".parquet":
        pq.write_table(pa.table({"s": np.zeros(count)}), path)
    column = "" if suffix == ".npy" else "s"
    with pytest.raises(ValueError, match=rf"found .*{count}.* in .*|expected one of") as error:
        read_scores_column(path, column, 30)
    assert "\n" not in str(error.value)
    if count:
        assert "expected 30 numbers, one per unit of the corpus: change --scores or --column" in str(error.value)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".npy"])
def test_columns_that_are_no_numbers_or_not_there(tmp_path, suffix):
    columns = {"words": ["a", "b"], "flags": [True, False], "holes": [1.0, None], "s": [1.0, 2.0]}
    path = write_table(tmp_path / f"s{suffix}", columns)
    for column in ("words", "flags", "holes"):
        with pytest.raises(ValueError, match="expected") as error:
            read_scores_column(path, column, 2)
        assert "\n" not in str(error.value) and path in str(error.value)
    for column, found in (("score", "--column 'score'"), ("", "4 columns and no --column")):
        with pytest.raises(ValueError, match=f"found {found}, expected one of words, flags, holes, s, as "):
            read_scores_column(path, column, 2)


def npy_header(text: str) -> bytes:
    """A .npy file that ends after its header."""
    data = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data


def test_arrays_that_are_no_scores_are_refused_without_memory(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}] * 3), allow_pickle=True)
    np.save(tmp_path / "square.npy", np.zeros((3, 1)))
    np.save(tmp_path / "scalar.npy", np.float32(1))
    np.save(tmp_path / "fields.npy", np.zeros(3, dtype=[("a", "f4"), ("b", "f4")]))
    np.save(tmp_path / "words.npy", np.array(["a", "b", "c"]))
    np.save(tmp_path / "flags.npy", np.zeros(3, dtype=bool))
    np.save(tmp_path / "complex.npy", np.zeros(3, dtype=complex))
    np.save(tmp_path / "nan.npy", np.array([1, np.nan, 2]))
    np.save(tmp_path / "large.npy", np.full(3, 1e39))
    for name, shape in (("claims", "(100000000000,)"), ("wraps", "(9223372036854775807, 4)"), ("negative", "(-3,)")):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        (tmp_path / f"{name}.npy").write_bytes(npy_header(header) + bytes(12))
    (tmp_path / "open.npy").write_bytes(npy_header("{'descr': ((((") + bytes(12))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00{")
    tracemalloc.start()
    for path in sorted(tmp_path.glob("*.npy")):
        with pytest.raises(ValueError, match="found .*, expected ") as error:
            read_scores_column(path, "", 3)
        assert "\n" not in str(error.value) and str(path) in str(error.value), path
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
    with pytest.raises(ValueError, match="expected a .npy file of numbers"):
        load_npy(tmp_path / "claims.npy")
    with pytest.raises(ValueError, match="column 's', expected none"):
        read_scores_column(tmp_path / "square.npy", "s", 3)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    for suffix in SUFFIXES:
        (tmp_path / f"junk{suffix}").write_bytes(b"\x00\x01junk\n\xff{")
        (tmp_path / f"none{suffix}").write_bytes(b"")
    whole = write_table(tmp_path / "whole.jsonl.gz", {"s": np.random.default_rng(0).normal(size=999).tolist()})
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:-400])
    (tmp_path / "list.jsonl").write_text('{"s": 1}\n[1]\n')
    (tmp_path / "gone.jsonl").write_text('{"s": 1}\n{"t": 1}\n')
    for path in sorted({*tmp_path.iterdir()} - {tmp_path / "whole.jsonl.gz"}):
        with pytest.raises(ValueError, match=re.escape(f"{path}")) as error:
            read_scores_column(path, "" if path.suffix == ".npy" else "s", 2)
        assert "\n" not in str(error.value) and "expected" in str(error.value)
    assert len(read_scores_column(whole, "s", 999)) == 999
    for name in ("a.txt", "a.npy.gz"):
        (tmp_path / name).write_text("1")
        with pytest.raises(ValueError, match=f"{name}, expected a file of .npy, .parquet, .csv"):
            read_scores_column(tmp_path / name, "", 1)


@pytest.fixture
def corpus(tmp_path):
    """A corpus of two files with lines that were set aside; prefix, and [(file, line)] of its units."""
    lines = [*documents(8), {"no": "text"}, *documents(5, seed=1)]
    files = [write_source(tmp_path / f"{name}.jsonl", lines) for name in "ab"]
    _, found = make(tmp_path, files, max_bad_fraction=0.5)
    return found.prefix, [(file, line) for file in files for line in range(1, 15) if line != 9]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_rows_are_matched_by_file_and_line(tmp_path, corpus, suffix):
    prefix, places = corpus
    order = np.random.default_rng(0).permutation(len(places))
    files, lines = (list(column) for column in zip(*(places[unit] for unit in order), strict=True))
    more = {"from": [*files, "other.jsonl", files[0]], "no": [*lines, 1, 9], "s": [*order.tolist(), -1.0, -2.0]}
    path = write_table(tmp_path / f"s{suffix}", more)
    np.testing.assert_array_equal(read_matched_scores(path, "s", prefix, ("from", "no")), np.arange(len(places)))
    part = write_subset(prefix, [3, 9, 20], tmp_path, label="part")
    np.testing.assert_array_equal(read_matched_scores(path, "s", part, ("from", "no")), [3, 9, 20])


def test_units_without_a_row_or_with_several(tmp_path, corpus):
    prefix, places = corpus
    files, lines = (list(column) for column in zip(*places, strict=True))
    columns = {"file": files, "line": lines, "s": list(range(len(places)))}
    path = write_table(tmp_path / "few.jsonl", {name: values[5:] for name, values in columns.items()})
    named = ", ".join(f"{file}:{line}" for file, line in places[:3])
    with pytest.raises(ValueError, match=rf"no row in .* for 5 of 26 units of .*X \(first: {re.escape(named)}\), exp"):
        read_matched_scores(path, "s", prefix)
    path = write_table(tmp_path / "twice.csv", {name: [*values, values[4]] for name, values in columns.items()})
    with pytest.raises(ValueError, match=r"several rows in .* for 1 of 26 units .*a.jsonl:5\), expected one for each"):
        read_matched_scores(path, "s", prefix)
    path = write_table(tmp_path / "none.parquet", {name: values[:0] for name, values in columns.items()})
    pq.write_table(pa.table({"file": pa.array([], "str"), "line": pa.array([], "i8"), "s": pa.array([], "f4")}), path)
    with pytest.raises(ValueError, match="no row in .* for 26 of 26 units"):
        read_matched_scores(path, "s", prefix)
    path = write_table(tmp_path / "holes.csv", {**columns, "line": [None, *lines[1:]]})
    with pytest.raises(ValueError, match=r"no row in .* for 1 of 26 units"):
        read_matched_scores(path, "s", prefix)
    path = write_table(tmp_path / "nan.parquet", {**columns, "s": [None, *columns["s"][1:]]})
    with pytest.raises(ValueError, match="1 of 26 scores .* no finite float32"):
        read_matched_scores(path, "s", prefix)


def test_matching_asks_for_columns_and_provenance(tmp_path, corpus):
    prefix, places = corpus
    files, lines = (list(column) for column in zip(*places, strict=True))
    path = write_table(tmp_path / "s.parquet", {"file": files, "line": [str(line) for line in lines], "s": files})
    with pytest.raises(ValueError, match="found --id-columns 'place', expected one of file, line, s, as"):
        read_matched_scores(path, "s", prefix, ("file", "place"))
    with pytest.raises(ValueError, match="found columns line, file, line for score, file and line, expected three"):
        read_matched_scores(path, "line", prefix)
    with pytest.raises(ValueError, match="found string in .*, expected numbers: change --column"):
        read_matched_scores(path, "s", prefix)
    np.save(tmp_path / "s.npy", np.zeros(26))
    with pytest.raises(ValueError, match="which has no columns, expected none"):
        read_matched_scores(tmp_path / "s.npy", "", prefix)
    write_corpus(tmp_path / "Y", [2, 2])
    path = write_table(tmp_path / "t.parquet", {"file": files, "line": lines, "s": lines})
    with pytest.raises(ValueError, match="does not exist, so no unit's file is known"):
        read_matched_scores(path, "s", tmp_path / "Y")


def test_a_runs_own_scores_are_one_number_for_each_unit(tmp_path, prefix):
    """``prefix`` has one unit."""
    for name, found in {
        "short": np.zeros(0), "long": np.zeros(2), "square": np.zeros((1, 1)), "fields": np.zeros(1, "f4,f4"),
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", found)
        with pytest.raises(ValueError, match=f"{name}.npy has shape .*, expected one number for each unit of"):
            load_unit_scores(tmp_path / f"{name}.npy", prefix)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000,), }"
    (tmp_path / "claims.npy").write_bytes(npy_header(header) + bytes(4))
    with pytest.raises(ValueError, match="expected a .npy file of numbers"):
        load_unit_scores(tmp_path / "claims.npy", prefix)
    np.save(tmp_path / "scores.npy", np.float32([0.5]))
    assert load_unit_scores(tmp_path / "scores.npy", prefix).tolist() == [0.5]
