"""A study as a page of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_bliss.base.text import format_flops, format_seconds
from megatron_bliss.report.arm_costs import AXES
from megatron_bliss.study.paired import Compared, Spread, label, results

NOTE = (
    "Loss in nats per labelled token, lower is better: {seeds}. In brackets: difference to "
    "{control}, seed by seed (bold where it is worse), and in how many seeds it is below. `guided` is the mean over "
    "the sets of the guide's kind ({guided}){other}."
)
READINGS = {
    "equal tokens": "Every arm has seen the same target tokens; what selection took comes on top.",
    "equal total compute": "Every arm has spent as many FLOPs as the cheapest in all: warm-up, selection and target's "
    "training. An arm that pays for its selection has seen fewer target tokens by then.",
}
"""What is said of each reading."""


def format_study(study: Mapping, plot: str = "") -> str:
    """The page; ``plot``: path of the picture."""
    seeds = study["seeds"]
    note = NOTE.format(
        seeds=f"mean ± standard error over seeds {', '.join(map(str, seeds))}"
        if len(seeds) > 1
        else f"seed {seeds[0]} alone",
        control=f"`{study['control']}`",
        guided=_listed(study["guided"]),
        other=f"; it does not speak for {_listed(study['other'])}" if study["other"] else "",
    )
    blocks = ["# Arms compared", note]
    for reading, rows in results(study).items():
        blocks += [f"## At {reading}", READINGS[reading], _table(study, rows)]
    if plot:
        blocks.append(f"![Gain on the guide against loss elsewhere]({plot})")
    return "\n\n".join(blocks) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(study: Mapping, rows: Mapping[str, Mapping]) -> str:
    """One row per arm: what its selection took, the guided sets' mean, each set alone."""
    alone = [*(study["guided"] if len(study["guided"]) > 1 else []), *study["other"]]
    lines = [["arm", "selection: time", "FLOPs", "guided", *alone]]
    lines.append(["---"] * len(lines[0]))
    for arm, row in rows.items():
        is_control = arm == study["control"]
        compared = [row["guided"], *(row["sets"][name] for name in alone)]
        lines.append([arm, *_selection(study, arm), *(_cell(one, is_control) for one in compared)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _selection(study: Mapping, arm: str) -> list[str]:
    """Time and FLOPs of an arm's selection, all rounds together: the mean over seeds."""
    costs = [point["cost"] for point in study["points"] if label(point) == arm]
    curves = {axis: [cost[f"selection_{axis}"] for cost in costs if cost[f"selection_{axis}"]] for axis in AXES}
    mean = {
        axis: statistics.fmean(curve[-1][1] for curve in found) if found else None for axis, found in curves.items()
    }
    return ["-" if mean["seconds"] is None else format_seconds(mean["seconds"]), format_flops(mean["flops"])]


def _cell(one: Compared, is_control: bool) -> str:
    value = format_spread(one.value)
    if is_control or one.difference.mean is None:
        return value
    difference = format_spread(one.difference, sign="+")
    if one.difference.mean > 0:
        difference = f"**{difference}**"
    return f"{value} ({difference}; {one.wins}/{one.pairs})"


def format_spread(spread: Spread, sign: str = "") -> str:
    """Such as "4.822 ± 0.011"; "-" where there is none."""
    if spread.mean is None:
        return "-"
    text = f"{spread.mean:{sign}.3f}"
    return text if spread.error is None else f"{text} ± {spread.error:.3f}"
