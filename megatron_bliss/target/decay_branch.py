"""A copy of the target whose learning rate falls to its end, for evaluation only: the main line goes on from before it.

At a constant learning rate a model's loss is mostly the step size's noise, so the paper evaluates a copy that was
trained 200 iterations longer with a falling rate. The copy starts from a checkpoint of the main line (weights and
optimizer), trains on the same corpus in an order of its own (its own seed, from that order's start) and writes in a
folder of its own: the main line reads nothing of it and gives the same numbers, bit for bit, with it and without.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_bliss.config.training import PretrainingConfig
from megatron_bliss.target.learning_rate import branch_settings
from megatron_bliss.target.segment import Recording, Segment, SegmentResult, train_segment
from megatron_bliss.target.setup import TargetSetup

STAGE = "decay_branch"
"""Its name in metrics and among the stages of a run."""


def train_decay_branch(
    setup: TargetSetup, config: PretrainingConfig, segment: Segment, recording: Recording
) -> SegmentResult:
    """Collective: train a copy over the branch's own ``segment`` and evaluate it once, at the end.

    ``segment.start`` is the main line's checkpoint after ``first_iteration`` of its ``total_iterations``: the learning
    rate falls from what it is there. Killed and called again it goes on from its own last checkpoint. Errors: as in
    ``train_segment``.
    """
    last = segment.last_iteration
    optimizer = branch_settings(
        config.optimizer,
        config.decay_branch_style,
        segment.first_iteration,
        segment.iterations,
        segment.total_iterations,
    )
    return train_segment(
        setup,
        replace(config, optimizer=optimizer, eval_interval=last),
        replace(segment, total_iterations=last),
        replace(recording, stage=STAGE),
    )
