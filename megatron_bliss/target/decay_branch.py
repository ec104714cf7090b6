"""A copy of the target whose learning rate falls to its end, for evaluation only: the main line goes on from before it.

At a constant learning rate a model's loss is mostly the step size's noise, so the paper evaluates a copy that was
trained 200 iterations longer with a falling rate. The copy starts from a checkpoint of the main line (weights and
optimizer), trains on the same corpus in an order of its own (its own seed, from that order's start) and writes in a
folder of its own: the main line reads nothing of it and gives the same numbers, bit for bit, with it and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_bliss.config.config import PretrainingConfig
from megatron_bliss.target.learning_rate import branch_settings
from megatron_bliss.target.model import Target
from megatron_bliss.target.segment import SegmentResult, train_segment

STAGE = "decay_branch"
"""Its name in metrics and among the stages of a run."""


def train_decay_branch(
    *,
    config: PretrainingConfig,
    start: Path,
    first_iteration: int,
    total_iterations: int,
    folder: Path,
    evaluate: Callable[[Target], dict[str, float]] | None,
    **segment: Any,
) -> SegmentResult:
    """Collective: train ``config.decay_branch_iters`` iterations on from ``start``, the main line's checkpoint after
    ``first_iteration`` of its ``total_iterations``; evaluated once, at the end.

    Killed and called again it goes on from its own last checkpoint. ``segment`` and errors: as in ``train_segment``.
    """
    iterations = config.decay_branch_iters
    last = first_iteration + iterations
    optimizer = branch_settings(
        config.optimizer, config.decay_branch_style, first_iteration, iterations, total_iterations
    )
    return train_segment(
        config=replace(config, optimizer=optimizer, eval_interval=last),
        start=start,
        first_iteration=first_iteration,
        last_iteration=last,
        total_iterations=last,
        folder=folder,
        evaluate=evaluate,
        stage=STAGE,
        **segment,
    )
