"""A run folder as a report reads it."""

import numpy as np
import pytest

from megatron_bliss.report.run_data import joined, read_run
from tests.report.run_folders import HOSTILE


def test_report_shows_scores_of_the_arms_that_choose(whole_run):
    run = read_run(whole_run)
    assert run.missing == []
    assert list(run.scores) == ["bliss"] and list(run.scores["bliss"]) == [1, 2]
    groups = run.scores_by_field["bliss", "domain"]
    assert {label: len(values) for label, values in groups.items()} == {"prose": 50, HOSTILE: 50}
    assert np.median(groups["prose"]) == pytest.approx(49 / 99)  # every second of 0, 1/99, ... 1
    assert run.round_tokens == {"round 1": 50 * 4 * 64, "round 2": 150 * 4 * 64}


@pytest.mark.parametrize("second", [[1, 2], [3, 4]])
def test_rounds_follow_one_another_whether_or_not_steps_restart(second):
    entries = [{"round": 1, "step": s, "loss": 1.0} for s in (1, 2)]
    entries += [{"round": 2, "step": s, "loss": 2.0} for s in second] + [{"round": 2, "step": 9}]
    assert joined(entries, "loss") == {1: ([1, 2], [1.0, 1.0]), 2: ([3, 4], [2.0, 2.0])}
