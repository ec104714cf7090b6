"""Trainers with a guide of several sets, of which one labels every token."""

from __future__ import annotations

from megatron_bliss.bilevel.train import BilevelTrainer
from megatron_bliss.data.guide import GuideSchedule, GuideSets
from tests.bilevel.trainers import RandomUnits

SETS, SIZES = ("a", "b", "c"), (11, 6, 9)
WEIGHTS = (3.0, 1.0, 2.0)
SHARES = (3.0, 1.0, 0.0)
"""The same sets, the last of them held against drift alone."""


class GuidedTrainer(BilevelTrainer):
    """With fixed weights."""

    names: tuple[str, ...] = SETS
    shares: tuple[float, ...] = WEIGHTS

    def __init__(self, config, proxy, score_model, teacher, train, validation, world) -> None:
        sizes = SIZES[: len(self.names)]
        sets = [RandomUnits(size, size, last=None if size == 6 else 2) for size in sizes]
        options = {"seed": 5, "rank": world.rank, "world_size": world.world_size}
        guide = GuideSchedule(GuideSets(sets, self.names, self.shares), config.validation_batch_size, **options)
        super().__init__(config, proxy, score_model, teacher, train, guide, world)

    @classmethod
    def of(cls, names: tuple[str, ...], shares: tuple[float, ...]) -> type[GuidedTrainer]:
        """The same with other sets."""
        return type("GuidedTrainer", (cls,), {"names": names, "shares": shares})


class MinimaxTrainer(GuidedTrainer):
    """With a set that weighs 0 where weights are fixed."""

    shares = SHARES
