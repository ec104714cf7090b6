"""The report's section on tasks: who is best when, since when, out of how many items; nothing without tasks."""

import json
import re

import pytest

from megatron_bliss.report.page import build_report
from megatron_bliss.report.summary import build_summary
from tests.report.run_folders import HOSTILE, check_page, write_config
from tests.results import result


def write_run(folder, values: dict[str, list[float]], **changes) -> None:
    """A run with a checkpoint of 51,200 tokens (step 50, the warm-up) and two rounds of 100 steps of 4 x 256 tokens."""
    text = write_config(folder, data={"seq_length": 256}, **changes)
    measured, losses = {}, {}
    for arm, averages in values.items():
        tokens = [(50 + 100 * number) * 4 * 256 for number in range(len(averages))]
        made = [result({"sciq": value + 0.1, HOSTILE: value - 0.1}) for value in averages]
        for number, one in enumerate(made):
            one["tasks"][HOSTILE]["metrics"]["perplexity"] = 1000.0 / (number + 1)
            one["tasks"]["sciq"] |= {"chance": 0.25, "bits_per_byte": 2.5, "bits_per_byte_stderr": 0.25}
        measured[arm] = [{"tokens": t, "result": r} for t, r in zip(tokens, made, strict=True)]
        losses[arm] = [{"iteration": t // 1024, "tokens": t, "losses": {"held": 5.0}} for t in tokens]
    summary = build_summary(losses, stages=[], domains_by_field={}, task_results=measured, seed=1, config_text=text)
    (folder / "summary.json").write_text(json.dumps(summary))


def rows(source: str) -> list[list[str]]:
    """Cells of the section's table, best ones in **."""
    section = source[source.index("<h2>Tasks, zero-shot") :]
    found = re.findall(r"<tr>(<td.*?)</tr>", section[: section.index("</table>")])
    bold = [row.replace("<b>", "**").replace("</b>", "**") for row in found]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in bold]


def test_arms_stand_side_by_side_in_each_round(tmp_path):
    write_run(tmp_path, {"bliss": [0.3, 0.5, 0.6], "random": [0.3, 0.4, 0.5]})
    source = build_report(tmp_path)
    page = check_page(source)
    cells = rows(source)
    assert [row[:4] for row in cells] == [
        ["warm-up", "all arms", "50", "40.0 ± 2.0"],
        ["round 1", "bliss", "150", "**60.0 ± 2.0**"],
        ["", "random", "150", "50.0 ± 2.0"],
        ["round 2", "bliss", "250", "**70.0 ± 2.0**"],
        ["", "random", "250", "60.0 ± 2.0"],
    ]
    assert [row[5] for row in cells] == ["30.0 ± 1.4", "**50.0 ± 1.4**", "40.0 ± 1.4", "**60.0 ± 1.4**", "50.0 ± 1.4"]
    assert [row[6] for row in cells] == ["1,000", "500", "500", "333.3", "333.3"]
    assert "sciq: acc_norm of 400 items, chance 25%" in page.text and "lm-eval 0.4.13" in page.text
    assert "bliss reached random's at 153,600 of 256,000 tokens: 1.67x fewer steps." in page.text
    assert "Average over the tasks, percent" in page.text and "pre-training steps" in page.text
    assert "Bits per byte of the right answer, lower is better" in page.text and source.count("2.500 ± 0.250") == 5
    assert "<script" not in source and HOSTILE[:25] in page.text  # names of tasks are text


def test_one_checkpoint_of_one_arm_has_a_row_and_no_speed_up(tmp_path):
    write_run(tmp_path, {"bliss": [0.3]}, arms="bliss")
    source = build_report(tmp_path)
    check_page(source)
    assert rows(source)[0][:3] == ["warm-up", "bliss", "50"] and "fewer steps." not in source


def test_tokens_stand_where_steps_are_not_known(tmp_path):
    write_run(tmp_path, {"bliss": [0.3, 0.4], "random": [0.3, 0.4]}, pretraining={})
    source = build_report(tmp_path)
    assert [row[:3] for row in rows(source)][1] == ["", "bliss", "153,600 tokens"]
    assert "target tokens" in check_page(source).text


def test_a_run_without_tasks_has_no_such_section(tmp_path):
    write_run(tmp_path, {})
    assert "Tasks, zero-shot" not in build_report(tmp_path)


@pytest.mark.parametrize("tasks", [{"x": [[1, 0.5]]}, "oops", {"x": 3}])
def test_damaged_results_are_named(tmp_path, tasks):
    write_run(tmp_path, {"bliss": [0.3, 0.4]})
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["arms"]["bliss"]["tasks"] = tasks
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = check_page(build_report(tmp_path))
    assert "summary.json: could not be read" in page.text
