"""How long a study takes: rates by hand, what is named to leave out, and a real study that is stopped in time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_bliss.run.options import parse_options
from megatron_bliss.study.budget import TIMES, Estimate, check_fits
from megatron_bliss.study.description import read_study
from megatron_bliss.study.probe import PROXY_STEPS, TARGET_STEPS, UPPER_STEPS, shortened
from megatron_bliss.study.rates import Rates
from megatron_bliss.study.runs import StudyRun, study_runs
from megatron_bliss.study.work import Planned, Segments, Work, finished_work
from tests.study.studies import run_tool, write_study


def work(stage: str, flops: float, seconds: float | None = None, **keys: object) -> Work:
    given = {"variant": "a", "arm": "bliss", "round": 1, "evaluations": 0, **keys}
    return Work(stage=stage, flops=flops, seconds=seconds, **given)


def test_a_stage_takes_what_the_stages_most_alike_took_for_their_flops() -> None:
    rates = Rates(
        [
            work("bilevel", 10.0, 5.0),
            work("bilevel", 10.0, 7.0),
            work("bilevel", 30.0, 3.0, variant="b"),
            work("score", 20.0, 40.0, arm="mates"),
            work("pretrain", 100.0, 14.0, arm="random", evaluations=2, evaluation_seconds=4.0),
            work("select", 0.0, 0.25),
        ],
        [8.0, 10.0],
    )
    assert rates.start == 9.0
    assert rates.seconds(work("bilevel", 20.0)) == pytest.approx(20 * 12 / 20)  # the same stage of other seeds
    assert rates.seconds(work("bilevel", 20.0, variant="c")) == pytest.approx(20 * 15 / 50)  # of all variants
    assert rates.seconds(work("score", 5.0)) == pytest.approx(10.0)  # of another arm
    assert rates.seconds(work("warmup proxy", 8.0)) == pytest.approx(8 * 55 / 70)  # of small models
    assert rates.seconds(work("warmup target", 50.0, evaluations=3)) == pytest.approx(50 * 10 / 100 + 3 * 2.0)
    assert rates.seconds(work("select", 0.0, arm="dsir")) == 0.25
    assert rates.seconds(work("evaluate", 0.0)) == 0.0  # nothing is known of it
    assert Rates([]).seconds(work("bilevel", 20.0)) == Rates([]).start == 0.0


def test_evaluations_are_those_that_a_run_makes(finished: Path, given: Path) -> None:
    for run in study_runs(read_study(given), finished):
        summary = json.loads((run.folder / "summary.json").read_text())
        made = len(summary["arms"]["random"]["losses"]["held"])
        segments = Segments(run.config)
        assert segments.evaluations("warmup target", 0) + segments.evaluations("pretrain", 1) == made
        assert segments.evaluations("decay_branch", 1) == 1 and segments.evaluations("score", 1) == 0


def test_the_planned_work_is_what_runs_record(finished: Path, given: Path) -> None:
    planned, runs = Planned(), study_runs(read_study(given), finished)
    for run in runs:
        done = {one.place: one.flops for one in finished_work(run)}
        assert {one.place: pytest.approx(one.flops) for one in planned.of(run)} == done
        assert planned.left(run, []) == []
    fresh = study_runs(read_study(given), finished / "fresh")
    assert {one.arm for one in planned.left(fresh[0], [])} == {"shared", "random", "dsir"}
    assert {one.arm for one in planned.left(fresh[1], fresh[:1])} == {"random", "dsir"}  # the warm-up of the first
    assert sum(one.arm == "shared" for one in planned.left(fresh[1], [])) == 1


class Dear(Estimate):
    """An estimate by hand: seconds of each variant, the warm-up's in the first run of a seed."""

    source = "by hand"
    each = {"hard": 100.0, "soft": 40.0, "wide": 300.0}

    def seconds(self, runs: Sequence[StudyRun]) -> float:
        return sum(self.each[run.variant] for run in runs)

    def left(self, runs: Sequence[StudyRun]) -> list:
        return [type("Left", (), {"run": run, "stages": [1], "seconds": self.each[run.variant]}) for run in runs]


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (900, ["take --seeds 1 2 (about 14:40)", "leave out the variants wide (about 7:00)"]),
        (450, ["take --seeds 1 (about 7:20)", "leave out the variants wide (about 7:00)"]),
        (410, ["leave out the variants wide, soft (about 5:00)"]),
        (150, ["leave out the variants wide and take --seeds 1 (about 2:20)"]),
        (50, []),
    ],
)
def test_what_does_not_fit_is_refused_with_what_fits(
    corpus: Path, tmp_path: Path, seconds: float, expected: list[str]
) -> None:
    study = read_study(write_study(tmp_path, corpus, seeds=[1, 2, 3], variants={"hard": {}, "soft": {}, "wide": {}}))
    estimate = Dear(study, study_runs(study, tmp_path / "out"))
    with pytest.raises(ValueError, match="found about 22:00 of work left \\(by hand\\), expected at most") as refused:
        check_fits(estimate, seconds)
    ways = str(refused.value).split(": ", 1)[1].split(", or ")
    assert ways[0].split(": ")[-1:] + ways[1:-1] == expected or (not expected and len(ways) == 1)
    assert ways[-1].endswith("is continued by the same command")
    check_fits(estimate, 1320)


def test_a_probe_is_a_run_of_few_steps_that_a_run_accepts(corpus: Path, tmp_path: Path) -> None:
    options = {"config": str(corpus / "config.yaml"), "pretraining.train_iters": "300", "arms": "[bliss,random]"}
    options |= {"pretraining.optimizer.lr_decay_style": "WSD", "pretraining.optimizer.lr_wsd_decay_iters": "100"}
    config = parse_options([part for name, value in options.items() for part in (f"--{name}", value)])
    short = shortened(config, "random", tmp_path)
    assert short.arms == ["random", "bliss"] and short.run_folder == str(tmp_path)
    assert (short.pretraining.warmup_iters, short.pretraining.train_iters) == (4, TARGET_STEPS)
    assert (short.proxy.warmup_iters, short.bilevel.upper_iters) == (PROXY_STEPS, UPPER_STEPS)
    assert short.pretraining.optimizer.lr_decay_style == "constant" and short.data == config.data


def test_a_plan_runs_nothing(given: Path, tmp_path: Path) -> None:
    """Nothing is finished: a short run tells how fast the machine is."""
    result = run_tool(given, tmp_path / "never", "--plan")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "4 runs, 0 of them finished; times at the rates of a short run of a few steps" in result.stdout
    assert [line[:4] for line in lines[3:5]] == [["seed", "1,", "hard", "9"], ["seed", "1,", "soft", "8"]]
    assert lines[-1][:2] == ["total", "34"] and lines[-1][-1] != "0:00"
    assert not (tmp_path / "never").exists()


def test_a_study_stops_in_time_and_goes_on(given: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "late"
    shutil.copytree(finished, output, symlinks=True)
    for path in output.glob("runs/seed_2/soft*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("study.json", "study.md"):
        (output / name).unlink()
    times = json.loads((output / f"runs/seed_2/hard{TIMES}").read_text())
    assert 0 < times["stage_seconds"] < times["seconds"]
    plan = run_tool(given, output, "--plan")
    assert "4 runs, 3 of them finished; times at the rates of this study's finished stages" in plan.stdout
    refused = run_tool(given, output, "--max-hours", "1e-5")
    assert refused.returncode == 1
    assert "expected at most 0:00: take --seeds 1 (about 0:00), or leave out the variants soft" in refused.stderr
    stopped = run_tool(given, output, "--max-hours", "1e-5", "--in-parts")
    assert stopped.returncode == 1 and "stopped before seed 2, soft, which takes about 0:" in stopped.stderr
    assert "the same command goes on there" in stopped.stderr and "of seeds 1" in stopped.stderr
    study = json.loads((output / "study.json").read_text())
    assert study["seeds"] == [1] and {point["seed"] for point in study["points"]} == {1}
    assert not (output / "runs/seed_2/soft").exists()
    ended = run_tool(given, output, "--max-hours", "1", "--in-parts")
    assert ended.returncode == 0, ended.stderr
    assert ", about 0:00 left" in ended.stdout
    assert json.loads((output / "study.json").read_text())["seeds"] == [1, 2]


@pytest.mark.parametrize("options, message", [(["--max-hours", "0"], "above 0"), (["--in-parts"], "without --max")])
def test_limits_that_say_nothing_are_refused(given: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = run_tool(given, tmp_path / "never", *options)
    assert result.returncode == 2 and message in result.stderr


def test_what_the_finished_study_took_is_told(given: Path, finished: Path) -> None:
    estimate = Estimate(read_study(given), study_runs(read_study(given), finished))
    assert estimate.seconds(estimate.runs) == 0.0
    starts = estimate.rates().start_seconds
    assert len(starts) == 4 and all(math.isfinite(one) and one > 0 for one in starts)
    fresh = Estimate(read_study(given), study_runs(read_study(given), finished))
    fresh.runs = study_runs(read_study(given), finished / "fresh")
    assert fresh.seconds(fresh.runs) == 0.0  # nothing is known
