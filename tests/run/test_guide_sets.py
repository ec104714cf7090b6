"""Runs with a guide of several sets: what is logged, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from tests.runs import command, metric_lines, run


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


@pytest.mark.parametrize(
    "names, options, message",
    [
        (("guide", "held"), ("--data.guide_weights", "[1]"), "found 1 data.guide_weights for 2 sets"),
        (("guide", "guide"), (), "found guide more than once among the last parts of data.validation_prefix"),
        (("guide", "nowhere"), (), "found data.validation_prefix[1]"),
        (("guide", "held"), ("--bilevel.validation_batch_size", "1"), "with 2 sets in data.validation_prefix"),
        (("guide", "held"), ("--arms", "published,random"), "with the arm published, expected one set for it"),
        (("guide", "held"), ("--data.guide_weights", "[1,0]"), "found data.guide_weights[1] 0.0, expected more than 0"),
    ],
)
def test_sets_that_cannot_work_are_refused(
    corpus: Path, tmp_path: Path, names: tuple, options: tuple, message: str
) -> None:
    guide = "--data.validation_prefix", sets(corpus, *names)
    with pytest.raises(ValueError) as error:
        parse_arguments(command(corpus, tmp_path / "run", *guide, *options)[2:])
    assert message in str(error.value)
