"""tools/decontaminate.py: what it prints, and that its numbers fit subset_index.py."""

import numpy as np
import pytest

from megatron_bliss.data.subset import root_units
from tests.data.corpora import SENTENCES, write_lines
from tools import decontaminate, inspect_index, subset_index


@pytest.fixture
def evaluation(tmp_path):
    """An evaluation file of one item, a sentence that some documents hold."""
    return write_lines(tmp_path / "bench.jsonl", [{"q": SENTENCES[0].upper()}, {"q": "short"}])


def test_its_numbers_exclude_units_and_drop_gives_the_same(scored, evaluation, tmp_path, capsys):
    prefix, scores = scored
    out = str(tmp_path / "out")
    assert decontaminate.main(["--corpus", prefix, "--evaluation", evaluation, "--output", out, "--drop"]) == 0
    printed = capsys.readouterr()
    hit = np.load(f"{out}/contaminated.npy")
    lines = printed.out.splitlines()
    assert 0 < len(hit) < 30
    assert lines[0] == "Shared 13-grams" and lines[3].split() == ["bench.jsonl", "2", "1", "8", str(len(hit))]
    assert lines[4] == f"{len(hit)} of 30 units hit ({len(hit) / 30:.2%})"
    assert "units  30/30 units" in printed.err and "evaluation  1/1 files" in printed.err
    subset = lines[5].removeprefix("subset: ")
    assert inspect_index.main(["verify", subset]) == 0
    options = ["--input-prefix", prefix, "--scores", scores, "--output-folder", out, "--fraction", "1"]
    capsys.readouterr()
    assert subset_index.main([*options, "--exclude", f"{out}/contaminated.npy"]) == 0
    excluded = capsys.readouterr().out.partition(":")[0]
    np.testing.assert_array_equal(root_units(excluded), root_units(subset))
    np.testing.assert_array_equal(root_units(subset), np.setdiff1d(np.arange(30), hit))


def test_raw_text_by_a_glob_and_lines_left_out(evaluation, tmp_path, capsys):
    write_lines(tmp_path / "a.json.gz", [{"body": SENTENCES[0]}, {"text": "x"}, {"body": "other"}])
    write_lines(tmp_path / "b.json.gz", [{"body": "more"}])
    options = ["--input", str(tmp_path / "*.json.gz"), "--input-keys", "body", "--evaluation", evaluation]
    out = str(tmp_path / "out")
    assert decontaminate.main([*options, "--output", out, "--ngram", "5", "--json-keys", "q", "--drop"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Shared 5-grams" and "1 of 3 units hit (33.33%)" in lines
    assert lines[-2:] == [
        f"1 lines left out; the first: {tmp_path}/a.json.gz, line 2: no key 'body'",
        f"clean: {out}/clean.jsonl.gz",
    ]


def test_bad_input_ends_with_one_line(scored, evaluation, tmp_path, capsys):
    options = ["--corpus", scored[0], "--output", str(tmp_path / "out")]
    assert decontaminate.main([*options, "--evaluation", evaluation, "--ngram", "0"]) == 1
    assert capsys.readouterr().err == "decontaminate: found --ngram 0, expected 1 or more: change --ngram\n"
    assert decontaminate.main([*options, "--evaluation", str(tmp_path / "none.txt")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        decontaminate.main([*options, "--input", "x.jsonl", "--evaluation", evaluation])
