"""Gain and loss of an arm per set, and the warnings of a loss."""

import math

import pytest

from megatron_bliss.report.gains import HeldOut, gains, loss_warnings
from megatron_bliss.report.summary import build_summary
from tests.report.costs import STAGES, evaluations

GUIDED = evaluations([8, 6, 5, 4, 3], rises=(0.0, 4.0))
RANDOM = evaluations([8, 7, 6.5, 6, 5.5])


def summary(margin=0.01, **changes):
    arms = {"bliss": GUIDED, "random": RANDOM} | changes
    held_out = HeldOut(["lambada"], ["c4"], margin)
    return build_summary(
        arms, stages=STAGES, domains_by_field={}, held_out=held_out, seed=1, config_text="", versions={}
    )


def test_a_gain_is_the_controls_loss_less_the_arms_at_the_end():
    found = summary()
    assert found["sets"] == {"guide": ["lambada"], "other": ["c4"]} and found["loss_margin"] == 0.01
    assert found["gains"] == {
        "bliss": {
            "lambada": {"tokens": 5000, "loss": 3, "control": 5.5, "gain": 2.5},
            "c4": {"tokens": 5000, "loss": 7, "control": 6.5, "gain": -0.5},
        }
    }


def test_an_arm_that_is_worse_by_more_than_the_margin_is_named():
    assert summary()["warnings"] == ["bliss is worse than random on c4 by 0.500"]
    assert summary(margin=0.5)["warnings"] == []
    better = evaluations([8, 6, 5, 4, 5.4], rises=(0.0, 1.0))
    assert summary(bliss=better)["warnings"] == []


def test_arms_of_an_unfinished_run_are_compared_where_both_have_been():
    found = gains(summary(random=RANDOM[:3])["arms"])["bliss"]["lambada"]
    assert found == {"tokens": 3000, "loss": 5, "control": 6.5, "gain": 1.5}


def test_without_the_control_nothing_is_gained_and_none_of_the_sets_is_lost():
    found = build_summary({"bliss": GUIDED}, stages=STAGES, domains_by_field={}, seed=1, config_text="")
    assert found["gains"] == {} and found["warnings"] == []
    assert found["sets"] == {"guide": ["lambada", "c4"], "other": []}
    assert found["equal_compute"]["flops"]["budget"] == 607


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_an_arm_that_diverged_is_named(end):
    found = summary(bliss=evaluations([8, 6, 5, 4, end]))
    assert found["gains"]["bliss"]["c4"]["gain"] is None
    assert found["warnings"][0] == "bliss has no finite loss on lambada where random has 5.500"
    assert found["equal_compute"]["flops"]["losses"]["bliss"]["lambada"] == pytest.approx(5 - 0.93)


def test_no_warning_where_both_diverged():
    one = {"tokens": 1, "loss": None, "control": None, "gain": None}
    assert loss_warnings({"bliss": {"c4": one}}, 0.0) == []
