"""Runs and files side by side in one table."""

import json

from megatron_bliss.evaluation.results import write_results
from tests.results import result
from tools import compare


def test_runs_and_files_stand_in_one_table_under_their_labels(tmp_path, capsys):
    for name, value in (("a", 0.5), ("b", 0.6)):
        for arm in ("bliss", "random"):
            folder = tmp_path / name / arm / "round_01" / "evaluate"
            folder.mkdir(parents=True)
            write_results(folder, result({"sciq": value + 0.1 * (arm == "bliss")}), "x")
    places = [str(tmp_path / "a"), f"other={tmp_path / 'b'}", f"one={tmp_path / 'a/bliss/round_01/evaluate'}"]
    assert compare.main(places) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = [line.split("|")[1].strip() for line in lines[2:7]]
    assert labels == [
        "a: bliss, round 1", "a: random, round 1", "other: bliss, round 1", "other: random, round 1", "one"
    ]  # fmt: skip
    assert "**70.0 ± 2.0**" in lines[4]
    assert compare.main([*places, "--output", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    assert compare.main([*places, "--output", str(tmp_path / "table.json")]) == 0
    assert list(json.loads((tmp_path / "table.json").read_text())) == labels


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    assert compare.main([str(folder)]) == 1 and "found no results.json" in capsys.readouterr().err
    write_results(folder, result({"sciq": 0.5}), "x")
    assert compare.main([str(folder), str(folder)]) == 1
    assert "found 'a' twice, expected different labels" in capsys.readouterr().err
