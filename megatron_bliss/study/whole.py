"""A study from its description to its page."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_bliss.base.files import atomic_file, read_json, write_json
from megatron_bliss.study.budget import Clock, Estimate, OutOfTime, check_fits, format_plan
from megatron_bliss.study.description import Study
from megatron_bliss.study.execution import launcher, run_all
from megatron_bliss.study.headline import headline
from megatron_bliss.study.html import format_html
from megatron_bliss.study.plots import write_plots
from megatron_bliss.study.points import read_points, sides
from megatron_bliss.study.probe import measure
from megatron_bliss.study.runs import StudyRun, study_runs
from megatron_bliss.study.table import format_study

NEEDED = ("control", "longer", "seeds", "guided", "other", "points")
"""Keys of every study.json; those of older ones have no others."""


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
    write_study(output / "study.json", read_points(study, runs))
    return write_page(output)


def write_page(output: Path) -> str:
    """Make plots, pages and ``headline.json`` from ``study.json`` alone; returns the page."""
    study = read_json(output / "study.json")
    plots = write_plots(study, output)
    write_json(output / "headline.json", headline(study))
    page = format_study(study, plots)
    with atomic_file(output / "study.md", "w") as file:
        file.write(page)
    with atomic_file(output / "study.html", "w") as file:
        file.write(format_html(page, output, output.resolve().name))
    return page


def remake_page(given: Path, output: Path) -> str:
    """Make plots and pages of a ``study.json`` of any name in another folder, without the runs; returns the page."""
    study = read_json(given)
    missing = [key for key in NEEDED if key not in study]
    if missing:
        raise ValueError(f"found no {', '.join(missing)} in {given}, expected a study.json: change --from")
    output.mkdir(parents=True, exist_ok=True)
    write_study(output / "study.json", study)
    return write_page(output)


def write_study(path: Path, study: Mapping) -> None:
    """Write ``study.json``: a line per point, pair and stage, which is a fifth of a line per number."""
    parts = []
    for key, value in study.items():
        is_long = isinstance(value, list) and value and isinstance(value[0], Mapping)
        text = "[\n" + ",\n".join(map(_compact, value)) + "\n]" if is_long else _compact(value)
        parts.append(f"{_compact(key)}: {text}")
    with atomic_file(path, "w") as file:
        file.write("{\n" + ",\n".join(parts) + "\n}\n")


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
