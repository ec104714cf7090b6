"""How long a study still takes, and what of it fits into some hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.base.text import align, format_flops, format_seconds
from megatron_bliss.study.description import LONGER, Study
from megatron_bliss.study.rates import Rates
from megatron_bliss.study.runs import StudyRun
from megatron_bliss.study.work import Planned, Work, finished_work

TIMES = ".seconds.json"
"""Beside a run: what its last attempt took, and what of it its stages took."""


class OutOfTime(ValueError):
    """The next run would not end in time."""


@dataclass(frozen=True)
class Left:
    """What a run still takes."""

    run: StudyRun
    stages: list[Work]
    seconds: float

    @property
    def flops(self) -> float:
        return sum(one.flops for one in self.stages)


class Estimate:
    """Seconds that runs still take; told from the stages that are done, at the time it is asked."""

    def __init__(self, study: Study, runs: Sequence[StudyRun], probe: Callable[[], Rates] | None = None) -> None:
        """probe: measures the machine; it is asked once, where no run is finished."""
        self.runs, self.planned, self._probe, self._probed = runs, Planned(), probe, None
        self.kept = study.control.split("/")[0]
        """The variant that no study goes without."""

    def rates(self) -> Rates:
        """Of finished stages; of the probe, too, as long as no run has ended."""
        known = [one for run in self.runs for one in finished_work(run)]
        starts = [found for run in self.runs if (found := _start_seconds(run)) is not None]
        if starts or self._probe is None:
            return Rates(known, starts)
        if self._probed is None:
            self._probed = self._probe()
        return Rates([*known, *self._probed.known], self._probed.start_seconds)

    @property
    def source(self) -> str:
        """Where the rates are from, in words."""
        if self._probed is None:
            return "at the rates of this study's finished stages"
        return "at the rates of a short run of a few steps, which errs on the long side"

    def left(self, runs: Sequence[StudyRun]) -> list[Left]:
        """What each of these runs still takes, where they alone are made."""
        rates, found = self.rates(), []
        for number, run in enumerate(runs):
            stages = self.planned.left(run, [one for one in runs[:number] if one.seed == run.seed])
            start = 0.0 if run.is_finished() else rates.start
            found.append(Left(run, stages, start + sum(rates.seconds(one) for one in stages)))
        return found

    def seconds(self, runs: Sequence[StudyRun]) -> float:
        """What these runs still take together."""
        return sum(one.seconds for one in self.left(runs))


def keep_times(run: StudyRun, seconds: float, before: Sequence[Work]) -> None:
    """Write what an attempt of a run took beside its stages; before: the stages that were done when it began."""
    places = {one.place for one in before}
    stages = sum(one.seconds for one in finished_work(run) if one.place not in places)
    write_json(run.beside(TIMES), {"seconds": round(seconds, 3), "stage_seconds": round(stages, 3)})


def _start_seconds(run: StudyRun) -> float | None:
    """What a finished run took beside its stages; None where it has not been written down."""
    path = run.beside(TIMES)
    if not path.is_file() or not run.is_finished():
        return None
    times = read_json(path)
    return max(0.0, times["seconds"] - times["stage_seconds"])


def format_plan(estimate: Estimate) -> str:
    """Every run with its stages, FLOPs and seconds that are left, and their sums."""
    found = estimate.left(estimate.runs)
    rows = [[one.run.name, *_cells(one.stages, one.seconds)] for one in found]
    stages = [stage for one in found for stage in one.stages]
    rows.append(["total", *_cells(stages, sum(one.seconds for one in found))])
    done = sum(not one.stages for one in found)
    title = f"Plan: {len(found)} runs, {done} of them finished; times {estimate.source}"
    return align(title, ["run", "stages left", "FLOPs", "time"], rows)


def _cells(stages: Sequence[Work], seconds: float) -> list[str]:
    if not stages:
        return ["finished", "-", "-"]
    return [str(len(stages)), format_flops(sum(one.flops for one in stages)), format_seconds(seconds)]


def check_fits(estimate: Estimate, seconds: float) -> None:
    """ValueError where a study takes longer than ``seconds``; it names what can be dropped."""
    total = estimate.seconds(estimate.runs)
    if total <= seconds:
        return
    ways = [*_fewer_seeds(estimate, seconds), *_fewer_variants(estimate, seconds)]
    ways.append("give --in-parts, which makes the runs that fit and is continued by the same command")
    raise ValueError(
        f"found about {format_seconds(total)} of work left ({estimate.source}), expected at most "
        f"{format_seconds(seconds)}: {', or '.join(ways)}"
    )


def _fewer_seeds(estimate: Estimate, seconds: float) -> list[str]:
    """The most of the first seeds that fit."""
    seeds = list(dict.fromkeys(run.seed for run in estimate.runs))
    for count in range(len(seeds) - 1, 0, -1):
        took = estimate.seconds([run for run in estimate.runs if run.seed in seeds[:count]])
        if took <= seconds:
            return [f"take --seeds {' '.join(map(str, seeds[:count]))} (about {format_seconds(took)})"]
    return []


def _fewer_variants(estimate: Estimate, seconds: float) -> list[str]:
    """Variants to leave out, the dearest first, until the others fit: of all seeds, or of the first one alone."""
    seeds = list(dict.fromkeys(run.seed for run in estimate.runs))
    for count in dict.fromkeys((len(seeds), 1)):
        runs, dropped = [run for run in estimate.runs if run.seed in seeds[:count]], []
        while (took := estimate.seconds(runs)) > seconds and (dearest := _dearest(estimate, runs)):
            dropped.append(dearest)
            runs = [run for run in runs if run.variant != dearest]
        if dropped and took <= seconds:
            which = "" if count == len(seeds) else f"and take --seeds {seeds[0]} "
            return [f"leave out the variants {', '.join(dropped)} {which}(about {format_seconds(took)})"]
    return []


def _dearest(estimate: Estimate, runs: Sequence[StudyRun]) -> str | None:
    """The variant that takes most; never the control's, nor one in which an arm trains on."""
    spent: dict[str, float] = {}
    for one in estimate.left(runs):
        if one.run.variant != estimate.kept and not one.run.variant.startswith(LONGER) and one.stages:
            spent[one.run.variant] = spent.get(one.run.variant, 0.0) + one.seconds
    return max(spent, key=spent.__getitem__, default=None)


class Clock:
    """Counts a study's time down, and stops it before a run that would not end in time."""

    def __init__(self, estimate: Estimate, seconds: float | None) -> None:
        """seconds: that there are from now on; None: no limit."""
        self.estimate, self._seconds, self._began = estimate, seconds, time.monotonic()

    def check(self, run: StudyRun) -> None:
        """OutOfTime where a run would not end in time."""
        if self._seconds is None:
            return
        number = self.estimate.runs.index(run)
        needed = self.estimate.left(self.estimate.runs[: number + 1])[-1].seconds
        rest = self._seconds - (time.monotonic() - self._began)
        if needed > rest:
            raise OutOfTime(
                f"stopped before {run.name}, which takes about {format_seconds(needed)}: found "
                f"{format_seconds(max(0.0, rest))} left of --max-hours, expected more; the same command goes on there"
            )

    def left(self) -> str:
        """What all runs still take, in words."""
        return f"about {format_seconds(self.estimate.seconds(self.estimate.runs))} left"
