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


def test_an_option_of_another_family_is_refused_before_anything_runs(corpus: Path, tmp_path: Path) -> None:
    refused = run(corpus, tmp_path / "run", "--score.family", "ngram", "--score.head_init_std", "0.1")
    assert refused.returncode == 2 and "found score.head_init_std 0.1 with score.family ngram" in refused.stderr
    assert not (tmp_path / "run").exists()
