"""Which stages a round has."""

from __future__ import annotations

from megatron_bliss.arms import ARMS
from megatron_bliss.config.config import Config
from megatron_bliss.config.stages import ROUND_STAGES

OWN_STAGES = ROUND_STAGES[: ROUND_STAGES.index("score")]
"""Stages that only the arms have that ask for them."""


def round_stages(config: Config, arm: str) -> list[str]:
    """The stages of a round of this arm, in order."""
    optional = {stage: stage in ARMS[arm].stages for stage in OWN_STAGES}
    optional["decay_branch"] = config.pretraining.decay_branch_iters > 0
    return [stage for stage in ROUND_STAGES if optional.get(stage, True)]
