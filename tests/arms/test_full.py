"""All units of every shard, whatever the policy; and the plan counts them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.subset import root_units
from megatron_bliss.plan.corpus import VIEW_BYTES
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.selection.select import repetition_warnings
from tests.runs import command, run

RUN = ("--arms", "full,random", "--rounds", "1", "--evaluation.tasks", "[]", "--selection.fraction", "0.25")


def test_a_run_trains_on_whole_shards_and_its_plan_says_so(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(corpus, folder, *RUN)
    assert result.returncode == 0, result.stderr
    shards = json.loads((folder / "shards" / "done.json").read_text())["prefixes"]
    units, kept = root_units(folder / "shards" / shards[1]), {}
    for arm in ("full", "random"):
        place = folder / arm / "round_01" / "select"
        kept[arm] = root_units(place / json.loads((place / "done.json").read_text())["prefix"])
    np.testing.assert_array_equal(kept["full"], units)
    assert len(kept["random"]) == round(len(units) / 4)
    place = folder / "full" / "round_01" / "select"
    policy = read_manifest(place / json.loads((place / "done.json").read_text())["prefix"])["policy"]
    assert policy["name"] == "top_fraction" and policy["fraction"] == 1.0
    tokens = [
        arm["validation_loss"][-1][0] for arm in json.loads((folder / "summary.json").read_text())["arms"].values()
    ]
    assert tokens[0] == tokens[1]  # as many as the other arm's
    plan = make_plan(parse_arguments(command(corpus, folder, *RUN)[2:]), Machine(world_size=1))
    assert plan["disk"]["parts"]["subsets"] == int(VIEW_BYTES * 1.25 * len(units))


def test_a_warning_of_repetition_does_not_say_to_keep_more() -> None:
    (line,) = repetition_warnings(100, 10, SelectionConfig(), keeps_all=True)
    assert line.endswith("selection.epoch_warning=4; lower pretraining.train_iters, or prepare more data")


def test_no_policy_is_asked(corpus: Path, tmp_path: Path) -> None:
    options = ("--arms", "full", *RUN[2:], "--selection.policy", "threshold", "--selection.threshold", "9")
    result = run(corpus, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr  # no score is that high
