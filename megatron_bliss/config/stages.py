"""The stages of a run, by name and in order: this is the one list of them."""

from __future__ import annotations

from typing import Literal, get_args

RoundStage = Literal[
    "bilevel",  # learns the score model
    "score",  # gives every unit of the round's shard a score
    "select",  # keeps the units on which the target trains
    "pretrain",  # trains the target on them
    "decay_branch",  # trains a copy on while its learning rate falls, to be evaluated in the target's place
    "evaluate",  # measures what was saved: losses, and tasks if there are any
]
"""A stage of a round of an arm."""
Stage = Literal["warmup", RoundStage]
"""What ``--stage`` takes: all of the warm-up, or one stage of a round."""
ROUND_STAGES: tuple[str, ...] = get_args(RoundStage)
SELECTION_STAGES = ROUND_STAGES[: ROUND_STAGES.index("pretrain")]
"""What a round does before its target trains: an arm's selection."""
WARMUP_STAGES = ("target", "decay_branch", "proxy", "evaluate")
"""Stages of the warm-up, which all arms share."""
