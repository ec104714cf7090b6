"""Runs with a guide of several sets: what is logged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from tests.runs import command, metric_lines, run

MINIMAX = "--bilevel.guide_weighting", "minimax"


def sets(corpus: Path, *names: str) -> str:
    return f"[{','.join(str(corpus / name) for name in names)}]"


def test_the_loss_of_every_set_is_logged_and_their_weighted_mean(corpus: Path, tmp_path: Path) -> None:
    guide = "--data.validation_prefix", sets(corpus, "guide", "held_other"), "--data.guide_weights", "[3,1]"
    options = (*guide, "--arms", "bliss,dsir,classifier", "--rounds", "1", "--evaluation.tasks", "[]")
    done = run(corpus, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    lines = [line for line in metric_lines(tmp_path / "run") if line.get("stage") == "bilevel"]
    assert lines
    for line in lines:
        mean = 0.75 * line["validation_loss_guide"] + 0.25 * line["validation_loss_held_other"]
        assert line["validation_loss"] == pytest.approx(mean, rel=1e-5)
        assert line["validation_loss_guide"] != line["validation_loss_held_other"]
    assert make_plan(parse_arguments(command(corpus, tmp_path / "run", *options)[2:]), Machine(world_size=1))["stages"]


def test_sets_are_held_against_a_control_that_starts_as_the_proxy_does(corpus: Path, tmp_path: Path) -> None:
    held = "--data.reference_prefix", str(corpus / "held_other"), "--bilevel.guide_weighting", "minimax"
    options = (*held, "--arms", "bliss", "--proxy.restart_each_round", "false", "--evaluation.tasks", "[]")
    done = run(corpus, tmp_path / "run", *options, "--bilevel.proxy_optimizer.lr", "1e-2", "--score.head_init_std", "1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in metric_lines(tmp_path / "run") if line.get("stage") == "bilevel"]
    rounds = [[line for line in lines if line["round"] == number] for number in (1, 2)]
    for line in lines:
        assert line["validation_loss"] == line["validation_loss_guide"]  # the other set is no part of the guide
        assert line["guide_weight_guide"] + line["guide_weight_held_other"] == pytest.approx(1.0)
    first = rounds[0][0]
    assert first["regret_guide"] == first["regret_held_other"] == 0.0
    assert first["guide_weight_held_other"] == pytest.approx(0.05 / 1.1)
    again = rounds[1][0]  # proxy and control went on, the multipliers started anew
    assert again["regret_guide"] != 0.0 and again["guide_weight_held_other"] == pytest.approx(0.05 / 1.1)
    plan = make_plan(parse_arguments(command(corpus, tmp_path / "run", *options)[2:]), Machine(world_size=1))
    record = json.loads((tmp_path / "run" / "bliss" / "round_01" / "bilevel" / "done.json").read_text())
    assert record["flops"] in [one["flops"] for one in plan["stages"] if one["stage"] == "bilevel"]


@pytest.mark.parametrize(
    "names, options, message",
    [
        (("guide", "held"), ("--data.guide_weights", "[1]"), "found 1 data.guide_weights for 2 sets"),
        (("guide", "guide"), (), "found guide more than once among the last parts of data.validation_prefix"),
        (("guide", "nowhere"), (), "found data.validation_prefix[1]"),
        (("guide", "held"), ("--bilevel.validation_batch_size", "1"), "with 2 sets in data.validation_prefix"),
        (("guide", "held"), ("--arms", "published,random"), "with the arm published, expected one set for it"),
        (("guide", "held"), ("--data.guide_weights", "[1,0]"), "found data.guide_weights[1] 0.0, expected more than 0"),
        (("guide",), ("--bilevel.minimax_rate", "2"), "it is for minimax alone; leave it out"),
        (("guide",), ("--bilevel.minimax_slack", "-0.1"), "found bilevel.minimax_slack -0.1 with bilevel.guide_weigh"),
        (("guide",), (*MINIMAX, "--bilevel.minimax_rate", "0"), "found bilevel.minimax_rate 0.0, expected more than 0"),
        (
            ("guide",),
            (*MINIMAX, "--bilevel.minimax_slack", ".inf"),
            "found bilevel.minimax_slack inf, expected a finite",
        ),
        (
            ("guide",),
            (*MINIMAX, "--score.family", "ngram", "--score.init_from", "counts", "--bilevel.upper_iters", "0"),
            "minimax where no arm makes a bilevel step by it",
        ),
        (("guide",), (*MINIMAX, "--arms", "random,dsir"), "minimax where no arm makes a bilevel step by it"),
        (("guide",), ("--data.reference_prefix", "held"), "with bilevel.guide_weighting fixed, expected minimax"),
        (("guide",), (*MINIMAX, "--data.reference_prefix", "nowhere"), "found data.reference_prefix 'nowhere'"),
        (("guide",), (*MINIMAX, "--data.reference_prefix", "[guide]"), "data.validation_prefix and data.reference_p"),
        (
            ("guide",),
            (*MINIMAX, "--data.reference_prefix", "held", "--bilevel.validation_batch_size", "1"),
            "found bilevel.validation_batch_size 1 with 2 sets in data.validation_prefix and data.reference_prefix",
        ),
        (("guide",), (*MINIMAX, "--arms", "published,random"), "with the arm published, expected fixed for it"),
    ],
)
def test_sets_that_cannot_work_are_refused(
    corpus: Path, tmp_path: Path, names: tuple, options: tuple, message: str
) -> None:
    guide = "--data.validation_prefix", sets(corpus, *names)
    with pytest.raises(ValueError) as error:
        parse_arguments(command(corpus, tmp_path / "run", *guide, *options)[2:])
    assert message in str(error.value)
