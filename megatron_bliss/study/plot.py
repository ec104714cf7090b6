"""Gain on the guide against loss elsewhere: which arms no other one beats on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_bliss.base.files import atomic_file
from megatron_bliss.study.paired import results

MARKERS = "osD^vP*Xp<>h"
"""One per variant, from the beginning again where there are more."""
COLORS = ("#3b6fb6", "#c8553d", "#4c9a62", "#8a5fb0", "#b08a2e", "#3a9aa8", "#a34b7c", "#6b7280")
"""One per arm, likewise."""

LINEAR_UP_TO, LINEAR_WITHIN = 1.0, 0.2
"""Nats: with a value beyond the first (an arm that has paid for its selection and hardly trained), axes are logarithmic
outside the second, so that the others stay apart."""


def write_plot(study: Mapping, path: Path) -> None:
    """A PNG with one panel per reading; bars are standard errors of the paired differences."""
    found = results(study)
    figure, panels = panels_beside(len(found))
    for axes, (reading, rows) in zip(panels, found.items(), strict=True):
        _draw(axes, rows)
        axes.set_title(f"At {reading}", fontsize=10)
        axes.set_xlabel(f"gain on the guide: {study['control']} - arm, nats")
        axes.set_ylabel(f"loss elsewhere: arm - {study['control']}, nats")
    save(figure, path)


def panels_beside(count: int) -> tuple[Figure, list]:
    """A figure with so many axes beside each other."""
    figure = Figure(figsize=(5.6 * count, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def legend_below(figure: Figure, axes) -> None:
    """The names of a panel's lines, below all panels, where they hide none."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def _draw(axes, rows: Mapping[str, Mapping]) -> None:
    variants = list(dict.fromkeys(name.split("/")[0] for name in rows))
    arms = list(dict.fromkeys(name.split("/")[1] for name in rows))
    places = {}
    for name, row in rows.items():
        variant, arm = name.split("/")
        gain, price = row["guided"].difference, row["other"].difference
        if gain.mean is None or price.mean is None:
            continue
        places[name] = (-gain.mean, price.mean)
        axes.errorbar(
            *places[name],
            xerr=gain.error,
            yerr=price.error,
            fmt=MARKERS[variants.index(variant) % len(MARKERS)],
            color=COLORS[arms.index(arm) % len(COLORS)],
            elinewidth=1,
            markersize=6,
        )
        axes.annotate(name, places[name], xytext=(6, 5), textcoords="offset points", fontsize=8)
    front = sorted(pareto_front(list(places.values())))
    axes.plot([x for x, _ in front], [y for _, y in front], color="#9ca3af", linewidth=1, linestyle="--", zorder=0)
    axes.axhline(0, color="#d1d5db", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#d1d5db", linewidth=0.8, zorder=0)
    axes.margins(0.15)
    if max((abs(value) for place in places.values() for value in place), default=0.0) > LINEAR_UP_TO:
        axes.set_xscale("symlog", linthresh=LINEAR_WITHIN)
        axes.set_yscale("symlog", linthresh=LINEAR_WITHIN)


def pareto_front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (gain, price) that no other one beats, with at least the gain at no higher price."""

    def is_beaten(gain: float, price: float) -> bool:
        return any(a >= gain and b <= price and (a, b) != (gain, price) for a, b in places)

    return [place for place in places if not is_beaten(*place)]
