"""Arms whose bilevel stage is not the run's: each in one tiny run with bliss, against what its options say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.arms import ARMS
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.report.costs import read_stages
from megatron_bliss.run.checks import parse_arguments
from tests.runs import command, metric_lines, run

VARIANTS = ["identity", "single_level", "published"]
SMALL = ["--rounds", "1", "--evaluation.tasks", "[]", "--bilevel.lower_iters", "2"]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory) -> Path:
    """A run of bliss and of every arm that varies its bilevel stage."""
    run_folder = tmp_path_factory.mktemp("variants") / "run"
    result = run(corpus, run_folder, *SMALL, "--arms", ",".join(["bliss", *VARIANTS]))
    assert result.returncode == 0, result.stderr
    return run_folder


def scores(run_folder: Path, arm: str) -> np.ndarray:
    return np.load(run_folder / arm / "round_01" / "score" / "scores.npy")


def test_these_are_all_such_arms() -> None:
    own = [name for name, arm in ARMS.items() if "bilevel" in arm.stages and arm.scheme.learns_scores]
    assert own == ["bliss", *VARIANTS]


def test_identity_scores_as_bliss_does_with_that_solver(corpus: Path, finished: Path, tmp_path: Path) -> None:
    """To the last bit, though another arm stands beside it."""
    result = run(corpus, tmp_path / "run", *SMALL, "--arms", "bliss", "--bilevel.solver", "identity")
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(scores(finished, "identity"), scores(tmp_path / "run", "bliss"))


def test_what_each_arm_fixes() -> None:
    given = BilevelConfig(
        solver_steps=3,
        lower_iters=4,
        kl_weight=0.5,
        params_dtype="bf16",
        micro_batch_size=2,
        compile=True,
        guide_weighting="minimax",
    )
    fixed = {
        "bliss": {},
        "identity": {"solver": "identity"},
        "single_level": {"solver": "identity", "kl_weight": 0.0, "lower_iters": 1},
        "published": {"params_dtype": "fp32", "micro_batch_size": 0, "compile": False},
        "mates_kl": {"guide_weighting": "fixed"},
    }
    for arm, changes in fixed.items():
        assert ARMS[arm].bilevel_options(given) == dataclasses.replace(given, **changes)


def test_every_arm_keeps_scores_of_its_own(finished: Path) -> None:
    found = {scores(finished, arm).tobytes() for arm in ["bliss", *VARIANTS]}
    assert len(found) == 1 + len(VARIANTS)


def test_a_plan_foretells_what_every_arm_records(corpus: Path, finished: Path) -> None:
    options = [*command(corpus, finished)[2:], *SMALL, "--arms", ",".join(["bliss", *VARIANTS])]
    plan = make_plan(parse_arguments(options), Machine(world_size=1))
    recorded = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in read_stages(finished)}
    assert {(one["arm"], one["round"], one["stage"]): one["flops"] for one in plan["stages"]} == recorded
    flops = {arm: recorded[arm, 1, "bilevel"] for arm in ["bliss", *VARIANTS]}
    # identity makes the one walk that gives d_i, as bliss does
    assert flops["single_level"] < flops["identity"] == flops["bliss"] < flops["published"]


def test_bilevel_stages_that_were_stopped_end_with_the_same_bits(corpus: Path, finished: Path, tmp_path: Path) -> None:
    """From the state of a step on their way, as a kill leaves it."""
    resumed = tmp_path / "run"
    shutil.copytree(finished, resumed, symlinks=True)
    for arm in VARIANTS:
        folder = resumed / arm / "round_01"
        assert (folder / "bilevel" / "latest.pt").is_file()
        for name in ("bilevel/done.json", "bilevel/final.pt", "score/done.json", "score/scores.npy"):
            (folder / name).unlink()
    result = run(corpus, resumed, *SMALL, "--arms", ",".join(["bliss", *VARIANTS]))
    assert result.returncode == 0, result.stderr
    for arm in VARIANTS:
        np.testing.assert_array_equal(scores(resumed, arm), scores(finished, arm))
        expected, found = (
            [json.dumps(line) for line in metric_lines(folder) if (line["arm"], line["stage"]) == (arm, "bilevel")]
            for folder in (finished, resumed)
        )
        assert sorted(found) == sorted(expected) and len(expected) == 8
