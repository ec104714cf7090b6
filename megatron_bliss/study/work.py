"""Stages of a study's runs: those that are done, with what they took, and those that are still to be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_bliss.config.config import Config
from megatron_bliss.plan.plan import planned_stages
from megatron_bliss.report.arm_costs import SHARED
from megatron_bliss.report.costs import read_stages
from megatron_bliss.study.runs import StudyRun
from megatron_bliss.study.warmup import warmup_source


@dataclass(frozen=True)
class Work:
    """One stage of a run."""

    variant: str
    arm: str
    round: int
    stage: str
    flops: float
    evaluations: int
    """How often it measures the target's loss on the test sets."""
    seconds: float | None = None
    """None: it is still to be done."""
    evaluation_seconds: float = 0.0
    """Of the seconds, those of its evaluations."""

    @property
    def place(self) -> tuple[str, int, str]:
        """What names it in its run."""
        return self.arm, self.round, self.stage


class Planned:
    """The stages of all runs, by what options say. Arms and seeds of a variant have the same work."""

    def __init__(self) -> None:
        self._found: dict[tuple, list[Work]] = {}

    def of(self, run: StudyRun) -> list[Work]:
        """All stages of a run."""
        key = run.variant, tuple(run.config.arms)  # a seed changes which units a shard holds, and hardly how many
        if key not in self._found:
            self._found[key] = [_work(run.variant, run.config, one) for one in planned_stages(run.config)]
        return self._found[key]

    def left(self, run: StudyRun, earlier: Sequence[StudyRun]) -> list[Work]:
        """Those that are neither done nor taken over from the warm-up of an earlier run of the same seed."""
        if run.is_finished():
            return []
        source = None if run.folder.exists() else warmup_source(run, earlier)
        done = {one.place for one in finished_work(run)}
        done |= {one.place for one in self.of(source) if one.arm == SHARED} if source else set()
        return [one for one in self.of(run) if one.place not in done]


def finished_work(run: StudyRun) -> list[Work]:
    """The stages of a run that are done; none where it has not begun."""
    records = read_stages(run.folder) if run.folder.is_dir() else []
    return [_work(run.variant, run.config, one) for one in records if one["seconds"] is not None]


def _work(variant: str, config: Config, record: dict) -> Work:
    """A stage from a record of a plan or of a run's summary."""
    return Work(
        variant,
        record["arm"],
        record["round"],
        record["stage"],
        record["flops"] or 0.0,
        Segments(config).evaluations(record["stage"], record["round"]),
        record.get("seconds"),
        record.get("evaluation_seconds") or 0.0,
    )


@dataclass(frozen=True)
class Segments:
    """The target's training in a run, cut by its stages."""

    config: Config

    @cached_property
    def _last(self) -> list[int]:
        """Iterations that are done when each round ends; the warm-up's first."""
        training = self.config.pretraining
        return [training.warmup_iters + number * training.train_iters for number in range(self.config.rounds + 1)]

    def evaluations(self, stage: str, number: int) -> int:
        """How often a stage measures the target: at multiples of ``eval_interval``, and at its end."""
        if "decay_branch" in stage:
            return 1
        if stage not in ("pretrain", "warmup target"):
            return 0
        interval, last = self.config.pretraining.eval_interval, self._last[number]
        first = self._last[number - 1] if number else 0
        return last // interval - first // interval + (last % interval > 0)
