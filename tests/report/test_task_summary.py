"""Task results of a run as curves, a speed-up and words."""

import copy
import json

import pytest

from megatron_bliss.evaluation.results import Cell
from megatron_bliss.report.summary import build_summary
from megatron_bliss.report.task_summary import (
    bits_curves,
    bits_rows,
    perplexity_curves,
    task_curves,
    task_facts,
    task_rows,
    task_speedup,
    task_speedup_sentence,
)
from megatron_bliss.report.text import format_table
from tests.results import result


def points(*values: float) -> list[dict]:
    """Checkpoints at 100, 200, ... tokens; task y is 0.1 better than x."""
    made = [{"tokens": 100 * (k + 1), "result": result({"x": v, "y": v + 0.1})} for k, v in enumerate(values)]
    for number, point in enumerate(made):
        point["result"]["tasks"]["x"]["metrics"]["perplexity"] = 50.0 - number
        point["result"]["tasks"]["y"] |= {"bits_per_byte": 3.0 - number / 8, "bits_per_byte_stderr": 0.125}
    return made


RUN = {"bliss": points(0.3, 0.5, 0.6), "random": points(0.3, 0.4, 0.45)}


def summary(bits: bool = True) -> dict:
    evaluations = {
        arm: [{"iteration": n, "tokens": 100 * n, "losses": {"held": 9.0 - n}} for n in (1, 2, 3)] for arm in RUN
    }
    run = copy.deepcopy(RUN)  # results of earlier versions have no bits per byte
    for task in [point["result"]["tasks"]["y"] for points in run.values() for point in points if not bits]:
        del task["bits_per_byte"], task["bits_per_byte_stderr"]
    return build_summary(
        evaluations, stages=[], domains_by_field={}, task_results=run, seed=1, config_text="", versions={}
    )


def test_curves_hold_tokens_value_and_error():
    curves = task_curves(RUN["bliss"])
    assert list(curves) == ["x", "y", "average"] and curves["x"][1] == [200, 0.5, 0.02]
    assert curves["average"][2] == [300, pytest.approx(0.65), pytest.approx(0.02 / 2**0.5)]
    assert perplexity_curves(RUN["bliss"]) == {"x": [[100, 50.0], [200, 49.0], [300, 48.0]]}
    assert bits_curves(RUN["bliss"]) == {"y": [[100, 3.0, 0.125], [200, 2.875, 0.125], [300, 2.75, 0.125]]}


def test_the_summary_holds_the_tasks_and_is_json():
    made = summary()
    assert made == json.loads(json.dumps(made))
    assert made["task_speedup"] == pytest.approx(300 / 175) == made["task_speedups"]["random"]
    assert made["task_facts"]["tasks"]["x"]["num_items"] == 400 and made["task_facts"]["lm_eval_version"] == "0.4.13"
    assert made["arms"]["random"]["tasks"]["y"][0] == [100, 0.4, 0.02]
    table = format_table(made)
    assert "warm-up" in table and "60.0 ± 2.0" in table and "1.71x fewer steps" in table
    assert "bits per byte of the right answer" in table and "2.875 ± 0.125" in table
    assert list(bits_rows(made["arms"])) == list(task_rows(made["arms"])) and "bits" not in format_table(
        summary(bits=False)
    )
    assert made["arms"]["random"]["bits_per_byte"]["y"][2] == [300, 2.75, 0.125]


def test_a_run_without_tasks_says_nothing_of_them():
    made = build_summary({"bliss": []}, stages=[], domains_by_field={}, seed=1, config_text="", versions={})
    assert made["task_speedup"] is None and made["task_facts"] == {} and "tasks" not in made["arms"]["bliss"]
    assert "zero-shot" not in format_table(made)
    assert task_facts({}) == {} and task_rows(made["arms"]) == {}


def test_the_warm_up_that_arms_share_stands_once():
    rows = task_rows(summary()["arms"])
    assert list(rows) == [(100, ""), (200, "bliss"), (200, "random"), (300, "bliss"), (300, "random")]
    assert rows[300, "random"]["x"] == Cell(0.45, 0.02)
    assert list(task_rows({"bliss": {"tasks": task_curves(RUN["bliss"][:1])}})) == [(100, "bliss")]


@pytest.mark.parametrize(
    "bliss, said",
    [
        (points(0.3, 0.5, 0.6), "bliss reached random's at 175 of 300 tokens: 1.71x fewer steps."),
        (points(0.3, 0.4, 0.44), "bliss never reached random's."),
        (points(0.46, 0.5, 0.6), "the shared warm-up had as much: no speed-up can be told."),
        ([*points(0.3, 0.3, 0.3, 0.5)], "375 of 300 tokens: 1.25x more steps."),
    ],
)
def test_the_sentence_says_what_the_number_says(bliss, said):
    arms = {"bliss": {"tasks": task_curves(bliss)}, "random": {"tasks": task_curves(RUN["random"])}}
    sentence = task_speedup_sentence(arms, "bliss", "random")
    assert said in sentence and "random at 50.0 ± 1.4" in sentence
    assert (task_speedup(arms, "bliss", "random") is None) == ("never" in said)
    assert task_speedup_sentence({"bliss": arms["bliss"]}, "bliss", "random") == ""
