"""A study from its description to its page."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_bliss.base.files import atomic_file, read_json, write_json
from megatron_bliss.study.description import Study
from megatron_bliss.study.execution import run_all
from megatron_bliss.study.headline import headline
from megatron_bliss.study.plot import write_plot
from megatron_bliss.study.points import read_points, sides
from megatron_bliss.study.runs import study_runs
from megatron_bliss.study.table import format_study


def run_study(study: Study, output: Path, *, only: Collection[str], entry: Path) -> str:
    """Run what is missing, write ``study.json`` and all that is made from it; returns the page."""
    runs = study_runs(study, output, only)
    sides(runs)  # what has no table ends the study here, not after its last run
    run_all(runs, output, entry, study.processes)
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
