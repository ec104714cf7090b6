"""How long a stage takes, told from stages that are done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_bliss.study.work import Work

TARGET_STAGES = ("warmup target", "warmup decay_branch", "pretrain", "decay_branch")
"""Stages that train the target; the others that count FLOPs are of proxy and score model."""

_ALIKE: tuple[Callable[[Work], object], ...] = (
    lambda work: (work.variant, work.arm, work.round, work.stage),
    lambda work: (work.variant, work.arm, work.stage),
    lambda work: (work.arm, work.stage),
    lambda work: work.stage,
    lambda work: work.stage in TARGET_STAGES,
    lambda work: None,
)
"""Which stages tell of one, the most alike first: the same of another seed, other rounds, other variants, other arms,
others that train the same kind of model, any."""


@dataclass(frozen=True)
class Rates:
    """What stages took, and what a run takes beside its stages."""

    known: Sequence[Work]
    start_seconds: Sequence[float] = field(default=())
    """Of some runs: what they took beside their stages, such as loading libraries and dealing shards."""

    @property
    def start(self) -> float:
        """Seconds that a run takes beside its stages."""
        return statistics.fmean(self.start_seconds) if self.start_seconds else 0.0

    def seconds(self, work: Work) -> float:
        """About how long a stage takes: its FLOPs, and its evaluations, at the rates of stages like it.

        A stage without FLOPs takes as long as those like it, and nothing where there is none of its name.
        """
        counts = [one for one in self.known if (one.flops > 0) == (work.flops > 0)]
        if not work.flops:
            counts = [one for one in counts if one.stage == work.stage]
        for alike in _ALIKE:
            like = [one for one in counts if alike(one) == alike(work)]
            if like:
                return self._from(like, work) + self._evaluations(work)
        return self._evaluations(work)

    def _from(self, like: Sequence[Work], work: Work) -> float:
        seconds = [one.seconds - one.evaluation_seconds for one in like]
        if not work.flops:
            return statistics.fmean(seconds)
        return work.flops * sum(seconds) / sum(one.flops for one in like)

    def _evaluations(self, work: Work) -> float:
        """Test sets are the same in all runs."""
        known = [one for one in self.known if one.evaluations]
        if not work.evaluations or not known:
            return 0.0
        each = sum(one.evaluation_seconds for one in known) / sum(one.evaluations for one in known)
        return work.evaluations * each
