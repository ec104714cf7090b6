"""The plots of a report as inline SVG, drawn by matplotlib without its global state.

Colours are written as placeholders and replaced by CSS variables, and text stays text, so that a plot takes the fonts
and the light or dark theme of the page it stands in.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#0303{index:02x}" for index in range(1, 7))
"""Placeholders of the page's colours: text and axes, grid and boundaries, and the series."""

_VARIABLES = {INK: "--ink-soft", FAINT: "--line"} | {color: f"--series-{i}" for i, color in enumerate(SERIES, 1)}
_SETTINGS = {
    "svg.fonttype": "none", "font.size": 8.5, "axes.titlesize": 8.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "grid.color": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "ytick.left": False, "axes.axisbelow": True, "lines.linewidth": 1.4,
    "figure.facecolor": "none", "axes.facecolor": "none", "lines.solid_capstyle": "round",
}  # fmt: skip
_UNWANTED = (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"font-family: [^;\"]*;? *", r'(?<=<g) id="[^"]*"')
"""Parts of matplotlib's SVG that would reach beyond the plot: rules for the whole page, fonts, ids that repeat."""
_WIDE, _HALF = 10.2, 4.95
"""Widths in inches of a plot across the page and of one of two beside each other: their text has the same size."""


class Line(NamedTuple):
    """One curve: values that are not finite are gaps; ``color`` counts from 0; ``smooth`` adds a running mean;
    ``error`` gives half the height of a band around it; ``faint`` lines stand behind the others, in one pale colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    markers: bool = False
    smooth: bool = False
    error: Sequence[float] | None = None
    faint: bool = False


class Marks(NamedTuple):
    """What is drawn beside the curves of a chart."""

    boundaries: Mapping[str, float] = {}
    """{label: x} of vertical lines."""
    level: float | None = None
    """A dashed horizontal line."""
    point: tuple[float, float] | None = None
    """A ring on a curve, with a dashed line down to the x axis."""


NO_MARKS = Marks()


def color_variable(index: int) -> str:
    """Return the CSS value of a series colour."""
    return f"var({_VARIABLES[SERIES[index % len(SERIES)]]})"


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    marks: Marks = NO_MARKS,
    skip_start: float = 0.0,
    log_y: bool = False,
    wide: bool = False,
) -> str:
    """Return an SVG of curves over a common x axis.

    skip_start: share of the x axis whose values do not stretch the y axis. A logarithmic y axis is used only where it
    helps: for positive values over more than a decade.
    """
    figure, axes = _figure(_WIDE if wide else _HALF, 3.5 if wide else 2.3)
    for line in lines:
        _draw(axes, line)
    axes.margins(x=0.02)
    _scale_y(axes, lines, marks.level, skip_start, log_y)
    _mark(axes, marks)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5, integer=True))
    axes.grid(axis="y", linewidth=0.6)
    return _svg(figure, title)


def _mark(axes, marks: Marks) -> None:
    if marks.level is not None:
        axes.axhline(marks.level, color=INK, linewidth=0.8, dashes=(4, 3), zorder=1)
    if marks.point is not None:
        (x, y), bottom = marks.point, axes.get_ylim()[0]
        axes.vlines(x, bottom, y, color=INK, linewidth=0.8, linestyles=(0, (4, 3)), zorder=1)
        axes.plot(x, y, "o", markersize=7, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.2)
        axes.set_ylim(bottom=bottom)
    for label, x in marks.boundaries.items():
        axes.axvline(x, color=FAINT, linewidth=0.8, zorder=0)
        axes.annotate(label, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                      fontsize=7.5, color=INK)  # fmt: skip


def _scale_y(axes, lines: Sequence[Line], level: float | None, skip_start: float, log_y: bool) -> None:
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    values = [y for _, y in points]
    if log_y and values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    end = max((x for x, _ in points), default=0)
    late = [y for x, y in points if x >= skip_start * end] + ([] if level is None else [level])
    if skip_start and late and max(late) > min(late):
        room = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - room, max(late) + room)


def _draw(axes, line: Line) -> None:
    color = INK if line.faint else SERIES[line.color % len(SERIES)]
    smooth = line.smooth and len(line.y) > 20
    marker = "o" if line.markers and len(line.x) <= 60 or len(line.x) == 1 else None
    alpha, width = (0.3, 0.8) if smooth or line.faint else (1.0, 1.4)
    axes.plot(line.x, line.y, color=color, alpha=alpha, linewidth=width, marker=marker, markersize=3)
    if line.error is not None:
        low, high = ([y + sign * e for y, e in zip(line.y, line.error, strict=True)] for sign in (-1, 1))
        axes.fill_between(line.x, low, high, color=color, alpha=0.13, linewidth=0)
    if smooth:
        axes.plot(line.x, running_mean(line.y, max(5, len(line.y) // 12)), color=color)


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Return the mean of the ``width`` values around each one (fewer at the ends), gaps left out."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    kernel = np.ones(width)
    totals = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    counts = np.convolve(finite.astype(float), kernel, mode="full")
    start = (width - 1) // 2
    totals, counts = totals[start : start + len(values)], counts[start : start + len(values)]
    return np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def histogram_chart(groups: Mapping[str, np.ndarray], *, title: str, x_label: str) -> str:
    """Return an SVG of one outlined histogram per group, as shares of the group over common bins."""
    figure, axes = _figure(_WIDE, 2.6)
    together = np.concatenate([np.asarray(values, dtype=np.float64) for values in groups.values()])
    edges = np.linspace(*_spread(together), 61)
    for index, values in enumerate(groups.values()):
        counts, _ = np.histogram(values, bins=edges)
        share = counts / max(1, len(values))
        axes.stairs(share, edges, color=SERIES[index % len(SERIES)], linewidth=1.4)
        axes.stairs(share, edges, color=SERIES[index % len(SERIES)], alpha=0.12, fill=True)
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", linewidth=0.6)
    return _svg(figure, title)


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Range of a histogram; widened where all values are equal."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def strip_chart(groups: Mapping[str, np.ndarray], *, title: str, x_label: str) -> str:
    """Return an SVG with a row per group, by median: thin 5-95 %, thick 25-75 %, a dot for the median."""
    rows = sorted(groups.items(), key=lambda item: float(np.median(item[1])))
    figure, axes = _figure(_WIDE, 0.55 + 0.21 * len(rows))
    for y, (_, values) in enumerate(rows):
        low, quarter, middle, upper_quarter, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
        axes.plot([low, high], [y, y], color=SERIES[0], linewidth=1, alpha=0.6)
        axes.plot([quarter, upper_quarter], [y, y], color=SERIES[0], linewidth=5, alpha=0.6)
        axes.plot([middle], [y], "o", color=SERIES[0], markersize=4.5)
    # matplotlib reads dollars as formulas
    labels = [f"{_clean(label)} ({short_number(len(values))})".replace("$", r"\$") for label, values in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", linewidth=0.6)
    return _svg(figure, title)


def _clean(label: str, width: int = 32) -> str:
    """Only what XML 1.0 and one line of an axis can hold."""
    label = "".join(character if character.isprintable() else " " for character in label)
    return label if len(label) <= width else label[: width - 1] + "…"


def short_number(value: float) -> str:
    """Return 1500000 as "1.5M"."""
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _figure(width: float, height: float):
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    """Draw a figure as an SVG element that scales with the page; ids in it are salted with the title."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for unwanted in _UNWANTED:
        text = re.sub(unwanted, "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)  # the view box stays: the page gives the size
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.replace("<svg", '<svg role="img"', 1)
