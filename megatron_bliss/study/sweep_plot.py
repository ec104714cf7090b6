"""Losses of a study's arms against the value of the option that its variants change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_bliss.study.curves_plot import SIDES
from megatron_bliss.study.paired import Spread, results
from megatron_bliss.study.plot import COLORS, MARKERS, legend_below, panels_beside, save

LOGARITHMIC_FROM = 10.0
"""Largest value by smallest: from there on the axis is logarithmic."""

Lines = dict[str, list[tuple[float, Spread]]]
"""Name of a line -> (value of the option, loss), in the order of the values."""


def write_sweep(study: Mapping, path: Path) -> None:
    """A PNG with a panel per side of the test sets, at equal tokens; bars are standard errors over the seeds."""
    sides = [side for side in SIDES if study[side]]
    figure, panels = panels_beside(len(sides))
    for axes, side in zip(panels, sides, strict=True):
        lines = sweep_lines(study, side)
        for number, (name, line) in enumerate(lines.items()):
            x, y = [value for value, _ in line], [loss.mean for _, loss in line]
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            error = [loss.error or 0.0 for _, loss in line]
            if len(line) > 1:
                axes.errorbar(x, y, yerr=error, color=color, marker=marker, markersize=5, capsize=2, label=name)
            else:  # an arm that runs with one value alone, such as the control
                axes.axhline(y[0], color=color, linestyle="--", linewidth=1, label=name)
                axes.axhspan(y[0] - error[0], y[0] + error[0], color=color, alpha=0.12, linewidth=0)
        axes.set_xlabel(study["sweep"]["option"])
        axes.set_ylabel(SIDES[side])
        if is_logarithmic([value for line in lines.values() for value, _ in line]):
            axes.set_xscale("log")
    legend_below(figure, panels[0])
    save(figure, path)


def sweep_lines(study: Mapping, side: str) -> Lines:
    """A line per arm, and, where a sweep was crossed with variants, per variant that it was crossed with."""
    lines: Lines = {}
    for place, row in results(study)["equal tokens"].items():
        variant, arm = place.split("/")
        if variant in study["sweep"]["points"] and row[side].value.mean is not None:
            series, value = study["sweep"]["points"][variant]
            lines.setdefault("/".join(filter(None, (series, arm))), []).append((value, row[side].value))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()}


def is_logarithmic(values: list[float]) -> bool:
    """Whether values are all above 0 and a factor of ten or more apart."""
    return min(values, default=0.0) > 0 and max(values) >= LOGARITHMIC_FROM * min(values)
