"""Scores of a corpus's units reach the units of a shard; whatever is no such file is refused before a run begins."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from megatron_bliss.arms.external import ExternalConfig, read_scores
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.manifest import adopt_manifest, corpus_digest, read_manifest
from megatron_bliss.data.subset import root_units, write_subset
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.run.options import parse_options
from tests.arms.shards import LENGTH, scored
from tests.runs import command, run

UNITS = 12


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A corpus of 12 units."""
    path = str(tmp_path / "corpus")
    with CorpusWriter(path, 300) as writer:
        writer.add(np.arange(1, 3 * UNITS + 1), [3] * UNITS)
    adopt_manifest(path, {"kind": "bytes", "sha256": "0", "vocab_size": 257, "eod": 256})
    return path


def file_of(path: Path, values: np.ndarray) -> Path:
    """The values in the kind of file that the path's suffix says."""
    if path.suffix == ".npy":
        np.save(path, values)
        return path
    table = pa.table({"url": [f"u{i}" for i in range(len(values))], "quality": values})
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path, row_group_size=5)
    return path


def options_of(path: Path) -> ExternalConfig:
    return ExternalConfig(str(path), "" if path.suffix == ".npy" else "quality")


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".csv"])
def test_a_shards_units_get_their_own_scores(tmp_path: Path, prefix: str, suffix: str) -> None:
    values = np.random.default_rng(0).normal(size=UNITS)
    part = write_subset(prefix, np.array([1, 3, 4, 8, 9, 11]), tmp_path, label="part")  # trained on, of the corpus
    for train_prefix, count in ((prefix, UNITS), (part, 6)):
        shard = write_subset(train_prefix, np.array([0, 2, 5]), tmp_path, label="shard")
        path = file_of(tmp_path / f"scores{suffix}", values[:count])
        changes = {"source": UnitDataset(shard, LENGTH), "train_prefix": train_prefix, "reference": None}
        found = scored("external", options_of(path), tmp_path, **changes)
        assert found.values.dtype == np.float32 and len(found.settings["sha256"]) == 64 and found.flops == 0
        np.testing.assert_array_equal(found.values, values[[0, 2, 5]].astype(np.float32))


def test_scores_of_whole_numbers_and_of_the_only_column_are_read(tmp_path: Path, prefix: str) -> None:
    np.save(tmp_path / "whole.npy", np.arange(UNITS))
    assert read_scores(ExternalConfig(str(tmp_path / "whole.npy")), prefix).tolist() == list(range(UNITS))
    pq.write_table(pa.table({"quality": np.arange(UNITS)}), tmp_path / "one.parquet")
    assert read_scores(ExternalConfig(str(tmp_path / "one.parquet")), prefix)[3] == 3


def test_scores_that_say_their_corpus_must_be_of_this_one(tmp_path: Path, prefix: str) -> None:
    path = file_of(tmp_path / "scores.npy", np.zeros(UNITS))
    beside = tmp_path / "scores.json"
    for settings in ({}, {"corpus_digest": corpus_digest(prefix)}):
        beside.write_text(json.dumps(settings))
        assert len(read_scores(options_of(path), prefix)) == UNITS
    beside.write_text(json.dumps({"corpus_digest": "f" * 64}))
    with pytest.raises(ValueError, match="found scores of corpus ffffffffffff in .*, as scores.json says, expected"):
        read_scores(options_of(path), prefix)


def bad_files(folder: Path) -> dict[str, tuple[Path, str, str]]:
    """{what is wrong: (file, column, message)}."""
    zeros = np.zeros(UNITS)
    good = {suffix: file_of(folder / f"good.{suffix}", zeros) for suffix in ("npy", "parquet", "csv")}
    (folder / "junk.npy").write_bytes(b"no array")
    (folder / "junk.parquet").write_bytes(b"no table")
    (folder / "empty.csv").write_bytes(b"")
    (folder / "scores.txt").write_text("1\n" * UNITS)
    (folder / "pickled.npy").write_bytes(pickle.dumps(zeros))
    np.save(folder / "objects.npy", np.array([Opened()] * UNITS, dtype=object), allow_pickle=True)
    with open(folder / "archive.npy", "wb") as file:
        np.savez(file, scores=zeros)
    square = np.zeros((UNITS, 1))
    return {
        "none given": (Path(), "", "found baselines.external.scores '.', expected a file with one score per unit"),
        "gone": (folder / "gone.npy", "", "gone.npy', expected a file with one score per unit"),
        "kind": (folder / "scores.txt", "", "scores.txt, expected a file of .npy, .parquet, .csv"),
        "length": (file_of(folder / "short.npy", zeros[1:]), "", r"found float64\[11\] in .*, expected 12 numbers"),
        "shape": (file_of(folder / "square.npy", square), "", r"found float64\[12, 1\] in .*, expected 12 numbers"),
        "infinite": (file_of(folder / "inf.npy", zeros + 1e300), "", r"12 of 12 scores in .* \(unit 0 is the first\)"),
        "words": (good["parquet"], "url", r"found string\[12\] in column url of .*, expected numbers"),
        "column": (good["csv"], "score", "external.column 'score', expected one of url, quality"),
        "no column": (good["parquet"], "", "2 columns and no baselines.external.column, expected one of url, quality"),
        "column of an array": (good["npy"], "quality", "column 'quality', expected none"),
        "junk": (folder / "junk.npy", "", "expected a .npy file of numbers"),
        "junk table": (folder / "junk.parquet", "", "expected a parquet file"),
        "empty": (folder / "empty.csv", "", "expected a CSV file with a line of column names"),
        "pickled": (folder / "pickled.npy", "", "expected a .npy file of numbers"),
        "objects": (folder / "objects.npy", "", "expected a .npy file of numbers"),
        "archive": (folder / "archive.npy", "", "found an archive of arrays"),
    }


class Opened:
    """Would be seen if it were unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a score file was unpickled",)


def test_what_is_no_score_file_is_refused_by_name(tmp_path: Path, prefix: str) -> None:
    for what, (path, column, message) in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            read_scores(ExternalConfig(str(path), column), prefix)
            pytest.fail(what)


def test_units_without_a_score_are_refused(tmp_path: Path, prefix: str) -> None:
    values = pa.array([None if unit == 7 else unit for unit in range(UNITS)], type=pa.float64())
    pq.write_table(pa.table({"quality": values}), tmp_path / "holes.parquet")
    with pytest.raises(ValueError, match=r"found 1 of 12 scores in .* \(unit 7 is the first\), expected numbers"):
        read_scores(ExternalConfig(str(tmp_path / "holes.parquet")), prefix)


def test_a_run_and_its_plan_ask_for_the_file_first(corpus: Path, tmp_path: Path) -> None:
    options = command(corpus, tmp_path / "run", "--arms", "external")[2:]
    with pytest.raises(ValueError, match="found baselines.external.scores '', expected a file with one score per unit"):
        parse_arguments(options)
    plan = make_plan(parse_options(options), Machine(world_size=1))
    assert any("baselines.external.scores ''" in line for line in plan["not_ready"])
    parse_arguments([*options[:-1], "random"])  # which needs none


def test_a_run_selects_by_the_file(corpus: Path, tmp_path: Path) -> None:
    units = read_manifest(corpus / "pool")["counts"]["units"]
    path = file_of(tmp_path / "quality.parquet", np.random.default_rng(1).normal(size=units))
    given = ("--baselines.external.scores", str(path), "--baselines.external.column", "quality")
    given += ("--selection.policy", "top_fraction")
    result = run(corpus, tmp_path / "run", "--arms", "external", "--rounds", "1", "--evaluation.tasks", "[]", *given)
    assert result.returncode == 0, result.stderr
    shards = json.loads((tmp_path / "run" / "shards" / "done.json").read_text())["prefixes"]
    shard = tmp_path / "run" / "shards" / shards[1]
    values = pq.read_table(path)["quality"].to_numpy()[root_units(shard)]
    round_folder = tmp_path / "run" / "external" / "round_01"
    np.testing.assert_array_equal(np.load(round_folder / "score" / "scores.npy"), values.astype(np.float32))
    selected = round_folder / "select" / json.loads((round_folder / "select" / "done.json").read_text())["prefix"]
    kept = np.isin(root_units(shard), root_units(selected))
    assert values[kept].min() > values[~kept].max()
