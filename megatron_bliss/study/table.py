"""A study as a page of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from megatron_bliss.base.text import format_bytes, format_flops, format_seconds
from megatron_bliss.report.arm_costs import AXES
from megatron_bliss.study.agreement import agreement_section
from megatron_bliss.study.bits import bits_section
from megatron_bliss.study.cells import compared_cell, difference_text, names_in_code, table
from megatron_bliss.study.paired import (
    at_equal_compute,
    at_equal_tokens,
    label,
    readings,
    results,
    trained_on,
)
from megatron_bliss.study.peaks import largest
from megatron_bliss.study.stage_costs import stage_costs_section
from megatron_bliss.study.task_results import tasks_section

NOTE = (
    "Loss in nats per labelled token, lower is better: {seeds}. In brackets: difference to {control}, seed by seed "
    "(bold where it is worse), and in how many seeds it is below (3/3: in each of three). `guided` is the mean over "
    "the sets of the guide's kind ({guided}){other}. Peak memory is that of the largest process in any seed."
)
NOTES = {
    at_equal_tokens: "Every arm has seen the same target tokens; what selection took comes on top.",
    at_equal_compute: "Every arm has spent as many FLOPs as the cheapest in all: warm-up, selection and target's "
    "training. An arm that pays for its selection has seen fewer target tokens by then.",
    trained_on: "Every arm is read at its end. In brackets: difference to an arm that has trained on until it had "
    "spent as many FLOPs in all: warm-up, selection and target's training. Where the brackets are missing, that arm's "
    "longer run ends before.",
}
"""What is said of each reading."""
SELECTION, PEAKS = ("selection: time", "FLOPs"), ("peak memory", "arm: peak memory")
"""Columns of what an arm's selection takes; the last is of all of its stages."""
NO_PLOTS: Mapping[str, str] = {}


def format_study(study: Mapping, plots: Mapping[str, str] = NO_PLOTS) -> str:
    """The page; ``plots``: {file name: what it shows}."""
    seeds = study["seeds"]
    note = NOTE.format(
        seeds=f"mean ± standard error over seeds {', '.join(map(str, seeds))}"
        if len(seeds) > 1
        else f"seed {seeds[0]} alone",
        control=f"`{study['control']}`",
        guided=names_in_code(study["guided"]),
        other=f"; it does not speak for {names_in_code(study['other'])}" if study["other"] else "",
    )
    blocks = ["# Arms compared", note]
    for reading, rows in results(study).items():
        blocks += [f"## At {reading}", NOTES[readings(study)[reading]], _table(study, rows)]
    for section in (bits_section, tasks_section, agreement_section, stage_costs_section):
        blocks += section(study)
    blocks += [f"![{title}]({name})" for name, title in plots.items()]
    return "\n\n".join(blocks) + "\n"


def _table(study: Mapping, rows: Mapping[str, Mapping]) -> str:
    """One row per arm: what its selection took, the guided sets' mean, each set alone."""
    alone = [*(study["guided"] if len(study["guided"]) > 1 else []), *study["other"]]
    rivals = next(iter(rows.values()))["rivals"]
    peaks = PEAKS if any(point.get("peak_bytes") for point in study["points"]) else ()  # older studies have none
    lines = [["arm", *SELECTION, *peaks, "guided", *alone, *(f"guided, - {rival}" for rival in rivals)]]
    for arm, row in rows.items():
        is_control = arm == study["control"]
        compared = [row["guided"], *(row["sets"][name] for name in alone)]
        taken = [*_selection(study, arm), *(map(format_bytes, largest(study, arm).values()) if peaks else ())]
        lines.append([arm, *taken, *(compared_cell(one, is_control) for one in compared)])
        lines[-1] += [difference_text(one) or "-" for one in row["rivals"].values()]
    return table(lines)


def _selection(study: Mapping, arm: str) -> list[str]:
    """Time and FLOPs of an arm's selection, all rounds together: the mean over seeds."""
    costs = [point["cost"] for point in study["points"] if label(point) == arm]
    curves = {axis: [cost[f"selection_{axis}"] for cost in costs if cost[f"selection_{axis}"]] for axis in AXES}
    mean = {
        axis: statistics.fmean(curve[-1][1] for curve in found) if found else None for axis, found in curves.items()
    }
    return ["-" if mean["seconds"] is None else format_seconds(mean["seconds"]), format_flops(mean["flops"])]
