"""Results side by side: what is printed is what is in the file, and what does not compare is said."""

import math

import pytest

from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.evaluation.results import Cell, best, cells, find_results, markdown, read_results, write_results
from tests.results import result


def test_the_error_of_an_average_is_that_of_independent_tasks():
    row = cells(result({"sciq": 0.8, "boolq": 0.5}))
    assert row["sciq"] == Cell(0.8, 0.02) and list(row) == ["sciq", "boolq", "average"]
    assert row["average"].value == pytest.approx(0.65) and row["average"].stderr == pytest.approx(0.02 / math.sqrt(2))
    texts = [Cell(0.4344, 0.0158).text, Cell(0.5, 0.0).text, Cell(0.5).text, Cell().text]
    assert texts == ["43.4 ± 1.6", "50.0 ± 0.0", "50.0", "-"]


def test_the_average_is_over_the_tasks_it_names():
    row = cells(result({"sciq": 0.8, "lambada_openai": 0.1}, average_tasks=["sciq"]))
    assert row["average"] == Cell(0.8, pytest.approx(0.02))


def test_the_best_of_a_column_is_marked_where_there_is_a_choice():
    rows = {"a": cells(result({"x": 0.5, "y": 0.2})), "b": cells(result({"x": 0.5, "z": 0.9}))}
    assert best(rows) == {("a", "x"), ("b", "x"), ("b", "average")}  # y and z stand alone
    assert best({"a": rows["a"]}) == set()


def test_the_table_marks_the_best_and_says_what_was_measured():
    text = markdown({"bliss": result({"sciq": 0.8, "boolq": 0.5}), "random|x": result({"sciq": 0.7, "boolq": 0.55})})
    lines = text.splitlines()
    assert lines[0] == "|  | sciq | boolq | average |" and lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2] == "| bliss | **80.0 ± 2.0** | 50.0 ± 2.0 | **65.0 ± 1.4** |"
    assert lines[3] == "| random\\|x | 70.0 ± 2.0 | **55.0 ± 2.0** | 62.5 ± 1.4 |"
    assert "sciq: acc_norm of 400 items; boolq: acc of 400 items" in text and "lm-eval 0.4.13." in text
    assert "do not compare" not in text and "Other data" not in text


def test_what_does_not_compare_is_said():
    one, other = result({"sciq": 0.8, "mine": 0.3}), result({"sciq": 0.7}, items=100, lm_eval_version="0.4.9")
    one["tasks"]["mine"]["metrics"]["perplexity"] = 1234.5
    text = markdown({"one": one, "other": other})
    assert "averages do not compare" in text and "acc_norm of 400 items or acc_norm of 100 items" in text
    assert "| other | 70.0 ± 2.0 | - | 70.0 ± 2.0 |" in text.replace("**", "")
    assert (
        "**70.0 ± 2.0** |\n" not in text and "Other data" not in text
    )  # no best average among averages of other tasks
    assert "lm-eval 0.4.13 and 0.4.9." in text
    assert "Perplexity: one: mine 1,234" in text
    one["tasks"]["sciq"] |= {"chance": 0.25, "data": {"known": False}}
    assert "Other data than the known sets: sciq." in markdown({"one": one}) and "chance 25%" in markdown({"one": one})


def test_results_are_found_where_they_lie(tmp_path):
    made = result({"sciq": 0.8})
    for place in ("run/warmup/evaluate", "run/bliss/round_01/evaluate", "run/bliss/round_02/evaluate", "run/alone"):
        (tmp_path / place).mkdir(parents=True)
        write_results(tmp_path / place, made, "x")
    run = tmp_path / "run"
    assert list(find_results(run)) == ["run: bliss, round 2"]
    every = ["run: warm-up", "run: bliss, round 1", "run: bliss, round 2"]
    assert list(find_results(run, every_round=True)) == every
    assert find_results(run / "alone") == find_results(run / "alone/results.json") == {"alone": made}
    with pytest.raises(ValueError, match="found no results.json in .*expected a run that was evaluated"):
        find_results(tmp_path)


def test_results_come_back_from_their_files_and_damaged_ones_are_refused(tmp_path):
    made = result({"sciq": 0.8})
    write_results(tmp_path, made, "step 100")
    assert read_results(tmp_path / "results.json") == made
    assert (tmp_path / "results.md").read_text() == markdown({"step 100": made})
    write_json(tmp_path / "results.json", {"format": 2})
    with pytest.raises(ValueError, match="no results of format 1"):
        read_results(tmp_path / "results.json")
    damaged = result({"sciq": 0.8})
    del damaged["tasks"]["sciq"]["value"]
    write_json(tmp_path / "results.json", damaged)
    with pytest.raises(ValueError, match="task sciq without value"):
        read_results(tmp_path / "results.json")
    assert read_json(tmp_path / "results.json") == damaged
