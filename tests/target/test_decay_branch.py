"""The decay branch leaves the main line alone, bit for bit, goes on after a kill, and ends at the lowest rate."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.config.output import CheckpointConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.target.decay_branch import train_decay_branch
from megatron_bliss.target.segment import Recording
from tests.distributed import run_distributed
from tests.targets import (
    LOGGING,
    PRETRAINING,
    evaluator,
    grouped,
    layout,
    logged,
    make_corpus,
    segment_of,
    setup_of,
    train,
    written,
)

CONFIG = replace(
    PRETRAINING,
    optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_decay_style="constant", lr_warmup_iters=3),
)


def branch(groups, prefix: str, folder: Path, start: Path, first: int = 6, seed: int = 77, evaluate=None):
    """Four iterations from the main line's checkpoint after ``first`` of its twelve."""
    metrics = MetricsLogger(folder, is_writer=groups.is_main, tensorboard=False)
    segment = replace(segment_of(prefix, first + 4, first=first, total=12, start=start), seed=seed)
    saving, evaluate = CheckpointConfig(save_interval=2), evaluate or evaluator(groups)
    recording = Recording(folder / "branch", saving, LOGGING, metrics, evaluate, arm="random", round=1)
    try:
        return train_decay_branch(setup_of(groups), CONFIG, segment, recording)
    finally:
        metrics.close()


def main_line(groups, prefix: str, folder: Path, with_branches: bool) -> list:
    """Two segments of six iterations, with a branch after each or none."""
    go = partial(train, setup_of(groups), config=CONFIG, evaluate=evaluator(groups))
    first, _ = go(segment_of(prefix, 6, total=12), folder / "first")
    if with_branches:
        branch(groups, prefix, folder / "one", first.checkpoint)
    second, _ = go(segment_of(prefix, 12, first=6, start=first.checkpoint), folder / "second")
    if with_branches:
        branch(groups, prefix, folder / "two", second.checkpoint, 12)
    both = [logged(folder / name, groups) for name in ("first", "second")]
    return [first.evaluations, second.evaluations, both, written(second.checkpoint)]


def compare_main_lines(rank: int, world_size: int, prefix: str, folder: str) -> tuple[bool, int]:
    with grouped(layout()) as groups:
        without = main_line(groups, prefix, Path(folder) / "without", False)
        beside = main_line(groups, prefix, Path(folder) / "with", True)
    return without == beside, len(without[2][1])


def test_the_main_line_is_the_same_bit_for_bit_with_branches_and_without(tmp_path):
    prefix = make_corpus(tmp_path / "corpus")
    (tmp_path / "one").mkdir()
    same, count = compare_main_lines(0, 1, prefix, str(tmp_path / "one"))
    assert same and count >= 6
    outcomes = run_distributed(compare_main_lines, 2, prefix, str(tmp_path))
    assert [same for same, _ in outcomes] == [True, True] and outcomes[0][1] >= 6


class Killed(Exception):
    pass


def test_a_branch_falls_to_the_lowest_rate_and_goes_on_after_a_kill(tmp_path):
    prefix = make_corpus(tmp_path / "corpus")

    def die(target) -> dict:
        raise Killed

    with grouped(layout()) as groups:
        start = train(setup_of(groups), segment_of(prefix, 6), tmp_path / "main", config=CONFIG)[0].checkpoint
        whole = branch(groups, prefix, tmp_path / "whole", start)
        with pytest.raises(Killed):
            branch(groups, prefix, tmp_path / "killed", start, evaluate=die)
        assert checkpoint.latest(tmp_path / "killed" / "branch").name == "step_00000008"
        resumed = branch(groups, prefix, tmp_path / "killed", start)
        lines, lines_again = logged(tmp_path / "whole", groups), logged(tmp_path / "killed", groups)
        other_order = branch(groups, prefix, tmp_path / "other", start, seed=78)
    rates = [entry["lr"] for entry in lines if "lr" in entry]
    assert rates == pytest.approx([1e-2 - 9e-3 * k / 4 for k in range(4)])
    assert {entry["stage"] for entry in lines} == {"decay_branch"}
    assert lines == lines_again and whole.evaluations == resumed.evaluations
    assert [point[0] for point in whole.evaluations] == [10]
    assert other_order.evaluations != whole.evaluations
    assert whole.flops > 0 and whole.checkpoint == tmp_path / "whole" / "branch" / "step_00000010"
