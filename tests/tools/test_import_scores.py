"""tools/import_scores.py: a column of any file becomes scores that tools/subset_index.py selects by."""

import json

import numpy as np
import pytest

from megatron_bliss.base.files import sha256_file
from megatron_bliss.data.manifest import corpus_digest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import root_units
from tools import import_scores, subset_index


def run(prefix, scores, folder, *more):
    return import_scores.main(["--corpus", prefix, "--scores", str(scores), "--output", str(folder), *more])


def selected(prefix, folder, capsys):
    """Root units of the best tenth by the scores in a folder."""
    options = ["--output-folder", str(folder / "subsets"), "--fraction", "0.1"]
    assert subset_index.main(["--input-prefix", prefix, "--scores", str(folder / "scores.npy"), *options]) == 0
    return root_units(capsys.readouterr().out.partition(":")[0]).tolist()


def test_a_column_becomes_scores_that_select(scored, tmp_path, capsys):
    prefix, _ = scored
    values = np.random.default_rng(0).permutation(30) / 7
    path = tmp_path / "quality.csv"
    path.write_text("url,quality\n" + "".join(f"u,{value}\n" for value in values))
    folder = tmp_path / "imported" / "scores"
    assert run(prefix, path, folder, "--column", "quality") == 0
    assert "30 scores from 0 to 4.14286, median" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(folder / "scores.npy"), values.astype(np.float32))
    record = json.loads((folder / "scores.json").read_text())
    assert record["corpus_digest"] == corpus_digest(prefix) and record["column"] == "quality"
    assert record["source"] == {"file": "quality.csv", "sha256": sha256_file(path)} and record["id_columns"] is None
    assert selected(prefix, folder, capsys) == sorted(np.argsort(values)[-3:].tolist())
    assert {path.name for path in folder.iterdir()} == {"scores.npy", "scores.json", "subsets"}


def test_rows_in_any_order_are_found_by_file_and_line(scored, tmp_path, capsys):
    prefix, _ = scored
    values = np.random.default_rng(1).permutation(30)
    rows = [{**row, "s": int(value)} for row, value in zip(read_provenance(prefix).to_pylist(), values, strict=True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(rows[place]) + "\n" for place in np.argsort(values)))
    assert run(prefix, path, tmp_path / "s", "--column", "s", "--id-columns", "file,line") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "scores.npy"), values)
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["id_columns"] == ["file", "line"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]))
    capsys.readouterr()
    assert run(prefix, path, tmp_path / "t", "--column", "s", "--id-columns", "file,line") == 1
    error = capsys.readouterr().err
    assert "no row" in error and "a.jsonl:29" in error and error.count("\n") == 1 and not (tmp_path / "t").exists()


def test_what_cannot_be_taken_is_refused(scored, tmp_path, capsys):
    prefix, _ = scored
    np.save(tmp_path / "other.npy", np.zeros(30))
    (tmp_path / "other.json").write_text(json.dumps({"corpus_digest": "f" * 64}))
    np.save(tmp_path / "short.npy", np.zeros(29))
    for name, message in (
        ("other.npy", "found scores of corpus ffffffffffff in"),
        ("short.npy", "found float64[29] in"),
        ("gone.npy", "expected a file with one score per unit of"),
    ):
        assert run(prefix, tmp_path / name, tmp_path / "s") == 1
        error = capsys.readouterr().err
        assert error.startswith("import_scores: found ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()
    with pytest.raises(SystemExit):
        run(prefix, tmp_path / "short.npy", tmp_path / "s", "--id-columns", "file")
    assert "expected two names of columns such as file,line" in capsys.readouterr().err


def test_finished_scores_of_another_kind_are_never_overwritten(scored, tmp_path, capsys) -> None:
    prefix, scores = scored
    output = tmp_path / "finished"
    output.mkdir()
    (output / "scores.json").write_text('{"scorer": 1}')
    (output / "scores.npy").write_bytes(b"kept")
    assert import_scores.main(["--corpus", prefix, "--scores", scores, "--output", str(output)]) == 1
    assert "found other scores" in capsys.readouterr().err and (output / "scores.npy").read_bytes() == b"kept"
