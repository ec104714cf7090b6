"""A study from its description to its page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_bliss.base.files import atomic_file, read_json, write_json
from megatron_bliss.study.budget import Clock, Estimate, OutOfTime, check_fits, format_plan
from megatron_bliss.study.description import Study
from megatron_bliss.study.execution import launcher, run_all
from megatron_bliss.study.headline import headline
from megatron_bliss.study.plot import write_plot
from megatron_bliss.study.points import read_points, sides
from megatron_bliss.study.probe import measure
from megatron_bliss.study.runs import StudyRun, study_runs
from megatron_bliss.study.table import format_study


@dataclass(frozen=True)
class Limits:
    """How much of a study is made by one command."""

    only: Collection[str] = ()
    """Of the arms, these and the control; none: all."""
    hours: float | None = None
    """No run is begun that would not end by then."""
    in_parts: bool = False
    """Begin also where not all runs fit."""
    plan_only: bool = False
    """Say what would be run, and run none of it."""


def run_study(study: Study, output: Path, entry: Path, limits: Limits) -> str:
    """Run what is missing, write ``study.json`` and all that is made from it; returns the page, or the plan.

    Where the time is over, the page is written of the seeds that are complete, and OutOfTime raised.
    """
    runs = study_runs(study, output, limits.only)
    sides(runs)  # what has no table ends the study here, not after its last run
    launch = launcher(entry, study.processes)
    first = next((run for run in runs if not run.is_finished()), None)
    estimate = Estimate(study, runs, first and partial(measure, first, study.control.split("/")[1], launch))
    if limits.plan_only:
        return format_plan(estimate)
    clock = Clock(estimate, None if limits.hours is None else 3600 * limits.hours)
    if limits.hours is not None and not limits.in_parts:
        check_fits(estimate, 3600 * limits.hours)
    try:
        run_all(runs, launch, clock)
    except OutOfTime as stopped:
        seeds = [seed for seed in study.seeds if all(run.is_finished() for run in runs if run.seed == seed)]
        if not seeds:
            raise
        _write(replace(study, seeds=seeds), [run for run in runs if run.seed in seeds], output)
        raise OutOfTime(f"{stopped}; {output / 'study.md'} is of seeds {', '.join(map(str, seeds))}") from stopped
    return _write(study, runs, output)


def _write(study: Study, runs: Sequence[StudyRun], output: Path) -> str:
    with atomic_file(output / "study.yaml", "w") as file:
        file.write(study.to_yaml())
    write_json(output / "study.json", read_points(study, runs))
    return write_page(output)


def write_page(output: Path) -> str:
    """Make plot, page and ``headline.json`` from ``study.json`` alone; returns the page."""
    study = read_json(output / "study.json")
    plot = "pareto.png" if study["other"] else ""
    if plot:
        write_plot(study, output / plot)
    write_json(output / "headline.json", headline(study))
    page = format_study(study, plot)
    with atomic_file(output / "study.md", "w") as file:
        file.write(page)
    return page
