"""summary.json holds what was promised, as JSON, also of a run that diverged."""

import json
import math

import pytest

from megatron_bliss.report.speedups import speedup_sentence
from megatron_bliss.report.summary import by_lift, config_digest, final_losses
from tests.report.summaries import DOMAINS, STAGES, evaluations, example


def test_summary_has_the_promised_keys_and_is_json():
    summary = example()
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    assert summary["arms"]["bliss"]["validation_loss"] == [[204800, 8], [409600, 6], [614400, 4], [819200, 3]]
    assert summary["arms"]["random"]["losses"]["c4"][-1] == [819200, 6]
    assert summary["arms"]["random"]["iterations"] == [50, 100, 150, 200]
    assert summary["speedup"] == pytest.approx(200 / 125) == summary["speedups"]["lambada"]
    assert summary["domains"] == {"pool": DOMAINS["domain"]["pool"], "selected": DOMAINS["domain"]["selected"]["bliss"]}
    assert summary["domains_by_field"] == DOMAINS
    assert summary["stages"] == STAGES and summary["seed"] == 7
    assert summary["config_digest"] == config_digest("seed: 7\n") != config_digest("seed: 8\n")
    assert {"python", "torch", "megatron-core", "megatron_bliss"} <= set(summary["versions"])


def test_summary_of_a_diverged_run_is_still_json():
    summary = example(bliss=evaluations([8, math.nan, math.inf, 5.5]))
    assert json.loads(json.dumps(summary, allow_nan=False))["arms"]["bliss"]["validation_loss"][1] == [409600, None]
    assert summary["speedup"] is None
    assert "never reached random's final loss 5 (its best: 5.5)" in speedup_sentence(summary)
    assert final_losses(summary)["lambada"] == {"bliss": 5.5, "random": 5}


def test_labels_are_in_order_of_what_selection_made_of_them():
    rows = by_lift({"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.8, "new": 0.1})
    assert [(row[0], row[3]) for row in rows] == [("b", 1.6), ("a", 0.2), ("new", None)]
