"""What differs between the rounds of arms: which stages they have, and how units are selected."""

from __future__ import annotations

from megatron_bliss.arms import ARMS
from megatron_bliss.config.config import Config
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.config.stages import ROUND_STAGES
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.families.family import TABLE_STARTS
from megatron_bliss.selection.select import in_round

OWN_STAGES = ROUND_STAGES[: ROUND_STAGES.index("score")]
"""Stages that only the arms have that ask for them."""
ASSUMED_SHARE = 0.2
"""Of a shard that a selection keeps, where the scores decide: the paper's."""


def selection_of(config: Config, arm: str, number: int) -> SelectionConfig:
    """How an arm's units are selected in a round: by the run's policy, or as a fraction that is all of them."""
    if ARMS[arm].keeps_all:
        return SelectionConfig("top_fraction", config.selection.epoch_warning, settings={"fraction": 1.0})
    return in_round(config.selection, number)


def starts_anew(config: ScoreConfig, number: int) -> bool:
    """Whether a round's score model is not that of the round before."""
    return number == 1 or not config.carry_over


def distils(config: ScoreConfig, number: int) -> bool:
    """Whether a round's score model begins by learning what counts say, because it has no table to put it in."""
    return starts_anew(config, number) and config.init_from in TABLE_STARTS and FAMILIES[config.family].distils


def needs_proxy(config: Config) -> bool:
    """Whether an arm looks at the warmed-up proxy: in its score stage, in upper steps, or for a score model's trunk."""
    has_trunk = FAMILIES[config.score.family].has_trunk
    return any(
        arm.reads_proxy
        or ("bilevel" in arm.stages and (arm.bilevel_options(config.bilevel).upper_iters > 0 or has_trunk))
        for arm in map(ARMS.__getitem__, config.arms)
    )


def round_stages(config: Config, arm: str) -> list[str]:
    """The stages of a round of this arm, in order."""
    optional = {stage: stage in ARMS[arm].stages for stage in OWN_STAGES}
    optional["decay_branch"] = config.pretraining.decay_branch_iters > 0
    return [stage for stage in ROUND_STAGES if optional.get(stage, True)]


def round_tokens(config: Config) -> int:
    """Tokens that the target trains on in one round."""
    training = config.pretraining
    return training.train_iters * training.global_batch_size * config.data.seq_length
