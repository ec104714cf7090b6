"""The speed-up in one plain sentence, also where there is none."""

import pytest

from megatron_bliss.report.speedups import other_speedups, speedup_sentence
from megatron_bliss.report.summary import build_summary
from megatron_bliss.report.text import format_table
from tests.report.summaries import evaluations, example


def test_speedup_is_null_without_one_of_the_arms():
    for arm, other in (("bliss", "random"), ("random", "bliss")):
        content = {arm: evaluations([8, 5])}
        summary = build_summary(content, stages=[], domains_by_field={}, seed=1, config_text="")
        assert summary["speedup"] is None
        assert f"those of {other} are missing" in speedup_sentence(summary)


@pytest.mark.parametrize(
    "bliss, sentence",
    [
        ([8, 6, 4, 3], "bliss reached random's final loss 5 at step 125 of 200: 1.60x fewer steps."),
        ([8, 7, 6.5, 6, 5, 4], "bliss reached random's final loss 5 at step 250 of 200: 1.25x more steps."),
    ],
)
def test_speedup_is_said_plainly(bliss, sentence):
    assert speedup_sentence(example(bliss=evaluations(bliss))) == sentence


def test_every_other_arm_has_its_own_sentence():
    summary = example(dsir=evaluations([8, 5, 4, 3]), mates=evaluations([8, 7, 6, 6]))
    dsir, mates = other_speedups(summary)
    assert dsir == "dsir reached random's final loss 5 at step 100 of 200: 2.00x fewer steps."
    assert mates == "No speed-up: mates never reached random's final loss 5 (its best: 6)."
    assert dsir in format_table(summary) and mates in format_table(summary)
    alone = {"mates": evaluations([8, 5])}
    assert other_speedups(build_summary(alone, stages=[], domains_by_field={}, seed=1, config_text="")) == []
