"""Statistics over paired seeds: arms of one seed share shards, warm-up and order of data, so their differences count.

Everything here follows from what :func:`~megatron_bliss.study.points.read_points` returns, which ``study.json`` holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from megatron_bliss.report.arm_costs import loss_by_cost
from megatron_bliss.report.curves import loss_at

Losses = Mapping[str, float | None]
"""{test set: loss} of one point where all points of its seed have used the same."""


class Spread(NamedTuple):
    """A mean over seeds and its standard error (None for one seed); both None where a seed has no finite value."""

    mean: float | None
    error: float | None


class Compared(NamedTuple):
    """One value of an arm over all seeds, against the control's."""

    value: Spread
    difference: Spread
    """Arm minus control, seed by seed: below 0 is better."""
    wins: int
    """Seeds in which the arm is below the control."""
    pairs: int
    """Seeds in which both have a finite value."""


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard error: the sample's standard deviation by the root of its size."""
    if not values or None in values:
        return Spread(None, None)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Spread(statistics.fmean(values), error)


def compare(values: Mapping[int, float | None], control: Mapping[int, float | None]) -> Compared:
    """An arm's values by seed, against the control's in the same seeds."""
    pairs = [(value, control.get(seed)) for seed, value in values.items()]
    differences = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    known = [one for one in differences if one is not None]
    wins = sum(one < 0 for one in known)
    return Compared(spread(list(values.values())), spread(differences), wins, len(known))


def at_equal_tokens(points: Sequence[Mapping]) -> list[dict[str, float | None]]:
    """Losses of the points of one seed where the one with the fewest target tokens ends."""
    tokens = min(curve[-1][0] for point in points for curve in point["losses"].values())
    return [{name: loss_at(curve, tokens) for name, curve in point["losses"].items()} for point in points]


def at_equal_compute(points: Sequence[Mapping]) -> list[dict[str, float | None]]:
    """Losses of the points of one seed where each has spent the FLOPs of the cheapest, selection included."""
    budget = min(point["cost"]["flops"][-1][1] for point in points)
    return [{name: loss_at(loss_by_cost(point, name, "flops"), budget) for name in point["losses"]} for point in points]


READINGS: dict[str, Callable[[Sequence[Mapping]], list[dict[str, float | None]]]] = {
    "equal tokens": at_equal_tokens,
    "equal total compute": at_equal_compute,
}
"""Where curves are read, the points of one seed together."""


def results(study: Mapping) -> dict[str, dict[str, dict]]:
    """{reading: {VARIANT/ARM: {"guided": Compared of the sets' mean, "other": the same, "sets": {set: Compared}}}}."""
    names = [*study["guided"], *study["other"]]
    found = {}
    for reading, read in READINGS.items():
        losses: dict[str, dict[int, Losses]] = {label(point): {} for point in study["points"]}
        for seed in study["seeds"]:
            points = [point for point in study["points"] if point["seed"] == seed]
            for point, values in zip(points, read(points) if points else [], strict=True):
                losses[label(point)][seed] = values
        control = losses.get(study["control"], {})
        found[reading] = {
            arm: {
                "guided": _compare_means(by_seed, control, study["guided"]),
                "other": _compare_means(by_seed, control, study["other"]),
                "sets": {name: _compare_means(by_seed, control, [name]) for name in names},
            }
            for arm, by_seed in losses.items()
        }
    return found


def label(point: Mapping) -> str:
    """VARIANT/ARM."""
    return f"{point['variant']}/{point['arm']}"


def _compare_means(arm: Mapping[int, Losses], control: Mapping[int, Losses], names: Sequence[str]) -> Compared:
    return compare(_means(arm, names), _means(control, names))


def _means(by_seed: Mapping[int, Losses], names: Sequence[str]) -> dict[int, float | None]:
    """The mean over some sets, for each seed."""
    return {seed: spread([losses.get(name) for name in names]).mean for seed, losses in by_seed.items()}
