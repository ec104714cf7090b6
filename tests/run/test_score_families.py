"""Runs whose score model has n-grams: carried over, resumed after a kill, scored by, planned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.base import checkpoint
from megatron_bliss.models.score import saved_score_model
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.report.costs import read_stages
from megatron_bliss.run.checks import parse_arguments
from tests.runs import command, kill_when, metric_lines, run

OPTIONS = (
    "--arms",
    "bliss",
    "--score.ngram_buckets",
    "4096",
    "--bilevel.score_optimizer.lr",
    "1e-2",
    "--evaluation.tasks",
    "[]",
)


def test_a_killed_run_ends_with_the_same_numbers_and_those_planned(corpus: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--score.family", "ngram")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(corpus, whole, *options)
    assert done.returncode == 0, done.stderr
    kill_when(corpus, killed, "bliss/round_02/bilevel/latest.pt", *options)
    done = run(corpus, killed, *options)
    assert done.returncode == 0, done.stderr
    assert metric_lines(killed) == metric_lines(whole)
    models = []
    for number in (1, 2):
        scores = f"bliss/round_{number:02d}/score/scores.npy"
        assert (killed / scores).read_bytes() == (whole / scores).read_bytes()
        assert len(np.unique(np.load(whole / scores))) > 10
        state = checkpoint.load_state(whole / f"bliss/round_{number:02d}/bilevel/final.pt")
        models.append(saved_score_model(state).ngrams.table.detach())
    moved = [torch.count_nonzero(table).item() for table in models]
    assert 0 < moved[0] < moved[1]  # what the first round learnt is still there
    assert json.loads((whole / "bliss/round_02/score/scores.json").read_text())["family"] == "ngram"
    planned = make_plan(parse_arguments(command(corpus, whole, *options)[2:]), Machine(world_size=1))
    recorded = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in read_stages(whole)}
    assert {(one["arm"], one["round"], one["stage"]): one["flops"] for one in planned["stages"]} == recorded


COUNTS = (*OPTIONS, "--score.family", "ngram", "--score.activation", "identity", "--score.init_from", "counts")


def test_a_run_by_counts_alone_makes_no_bilevel_step(corpus: Path, tmp_path: Path) -> None:
    options = (*COUNTS, "--bilevel.upper_iters", "0", "--score.carry_over", "false")
    done = run(corpus, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    scores = [np.load(tmp_path / f"run/bliss/round_{number:02d}/score/scores.npy") for number in (1, 2)]
    for found in scores:
        assert 0.5 < found.std() < 2 and len(np.unique(found)) > 10
    assert not [line for line in metric_lines(tmp_path / "run") if line.get("stage") == "bilevel"]
    record = json.loads((tmp_path / "run/bliss/round_02/bilevel/done.json").read_text())
    assert record["flops"] == 0 and record["validation_loss"] is None
    assert not [one for one in record["needs"] if "proxy" in one] and not (tmp_path / "run/warmup/proxy").exists()
    planned = make_plan(parse_arguments(command(corpus, tmp_path / "run", *options)[2:]), Machine(world_size=1))
    recorded = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in read_stages(tmp_path / "run")}
    assert {(one["arm"], one["round"], one["stage"]): one["flops"] for one in planned["stages"]} == recorded
    assert not {"bilevel", "proxy warm-up"} & {one["stage"] for one in planned["memory"]["stages"]}
    summary, page = (tmp_path / "run" / name for name in ("summary.json", "report.html"))
    assert "bliss" in json.loads(summary.read_text())["arms"] and "bliss" in page.read_text()


def test_steps_go_on_from_the_counts_and_a_killed_stage_from_its_steps(corpus: Path, tmp_path: Path) -> None:
    options, whole, killed = (*COUNTS, "--rounds", "1"), tmp_path / "whole", tmp_path / "killed"
    assert (done := run(corpus, whole, *options)).returncode == 0, done.stderr
    kill_when(corpus, killed, "bliss/round_01/bilevel/latest.pt", *options)
    assert (done := run(corpus, killed, *options)).returncode == 0, done.stderr
    assert metric_lines(killed) == metric_lines(whole)
    scores = [(folder / "bliss/round_01/score/scores.npy").read_bytes() for folder in (killed, whole)]
    assert scores[0] == scores[1]
    tables = []
    for folder, steps in ((whole, "8"), (tmp_path / "none", "0")):
        if steps == "0":
            assert (done := run(corpus, folder, *options, "--bilevel.upper_iters", steps)).returncode == 0, done.stderr
        state = checkpoint.load_state(folder / "bliss/round_01/bilevel/final.pt")
        tables.append(saved_score_model(state).ngrams.table.detach())
    moved = (tables[0] - tables[1]).abs()
    assert tables[1].abs().max() > 0 and 0 < moved.max() < 0.2  # 8 steps of 1e-2 at most


DISTILLED = (
    *("--arms", "bliss", "--evaluation.tasks", "[]", "--score.init_from", "counts", "--score.ngram_buckets", "4096"),
    *("--score.distil_iters", "8", "--score.distil_batch_size", "4", "--score.activation", "identity"),
)


def flops_of(run_folder: Path) -> dict[tuple, float]:
    return {(one["arm"], one["round"], one["stage"]): one["flops"] for one in read_stages(run_folder)}


def test_a_transformer_learns_what_counts_say_and_a_killed_run_ends_with_the_same(corpus: Path, tmp_path: Path) -> None:
    """Killed twice: amid the distillation, and amid the upper steps that follow it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (done := run(corpus, whole, *DISTILLED)).returncode == 0, done.stderr
    assert "bliss, round 1: scores have a rank correlation of" in done.stderr
    kill_when(corpus, killed, "bliss/round_01/bilevel/distillation/latest.pt", *DISTILLED)
    kill_when(corpus, killed, "bliss/round_01/bilevel/latest.pt", *DISTILLED)
    assert (again := run(corpus, killed, *DISTILLED)).returncode == 0, again.stderr
    assert metric_lines(killed) == metric_lines(whole)
    for number in (1, 2):
        scores = [folder / f"bliss/round_{number:02d}/score/scores.npy" for folder in (killed, whole)]
        assert scores[0].read_bytes() == scores[1].read_bytes()
    lines = [line for line in metric_lines(whole) if line["stage"] == "distillation"]
    assert [line["step"] for line in lines] == [*range(1, 9), 8]  # round 2 goes on with the score model of round 1
    assert {line["round"] for line in lines} == {1} and lines[0]["unexplained"] == lines[0]["loss"]
    records = [json.loads((one / "bliss/round_01/bilevel/done.json").read_text()) for one in (killed, whole)]
    assert records[0]["warnings"] == records[1]["warnings"] and records[0]["needs"] == records[1]["needs"]
    low = [text for text in records[1]["warnings"] if "of the counts on units held back" in text]
    assert bool(low) == (lines[-1]["rank_correlation"] < 0.8)
    planned = make_plan(parse_arguments(command(corpus, whole, *DISTILLED)[2:]), Machine(world_size=1))
    assert {(one["arm"], one["round"], one["stage"]): one["flops"] for one in planned["stages"]} == flops_of(whole)


def test_a_distilled_start_may_be_kept_as_it_is(corpus: Path, tmp_path: Path) -> None:
    options = (
        *DISTILLED,
        "--bilevel.upper_iters",
        "0",
        "--score.carry_over",
        "false",
        "--bilevel.params_dtype",
        "bf16",
    )
    assert (done := run(corpus, tmp_path / "run", *options)).returncode == 0, done.stderr
    lines = metric_lines(tmp_path / "run")
    assert not [line for line in lines if line["stage"] == "bilevel"]
    for number in (1, 2):
        folder = tmp_path / f"run/bliss/round_{number:02d}"
        assert len(np.unique(np.load(folder / "score/scores.npy"))) > 10
        assert [line for line in lines if line["round"] == number and "rank_correlation" in line]
        models = [
            checkpoint.load_state(folder / "bilevel" / name)["score_model"] for name in ("distilled.pt", "final.pt")
        ]
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    planned = make_plan(parse_arguments(command(corpus, tmp_path / "run", *options)[2:]), Machine(world_size=1))
    found = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in planned["stages"]}
    assert found == flops_of(tmp_path / "run") and found["bliss", 2, "bilevel"] > 0


def test_an_option_of_another_family_is_refused_before_anything_runs(corpus: Path, tmp_path: Path) -> None:
    refused = run(corpus, tmp_path / "run", "--score.family", "ngram", "--score.head_init_std", "0.1")
    assert refused.returncode == 2 and "found score.head_init_std 0.1 with score.family ngram" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_no_step_without_a_start_is_refused_before_anything_runs(corpus: Path, tmp_path: Path) -> None:
    refused = run(corpus, tmp_path / "run", *OPTIONS, "--score.family", "ngram", "--bilevel.upper_iters", "0")
    assert refused.returncode == 2 and "found bilevel.upper_iters 0 with score.init_from proxy" in refused.stderr
    options = (*COUNTS, "--bilevel.upper_iters", "0", "--arms", "bliss,mates_kl")
    refused = run(corpus, tmp_path / "run", *options)
    assert refused.returncode == 2 and "expected at least one step for the arm mates_kl" in refused.stderr
    assert not (tmp_path / "run").exists()
