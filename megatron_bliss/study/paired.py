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


class Reading(NamedTuple):
    """The points of one seed, read alike: their losses, and those that each is held against."""

    losses: dict[str, Losses]
    """VARIANT/ARM -> its losses."""
    rivals: dict[str, dict[str, Losses]]
    """Arm -> VARIANT/ARM -> losses of that arm where VARIANT/ARM is read; the control's arm first."""


def at_equal_tokens(study: Mapping, points: Sequence[Mapping]) -> Reading:
    """Losses where the point with the fewest target tokens ends. ``points``: of one seed."""
    tokens = min(curve[-1][0] for point in points for curve in point["losses"].values())
    found = [{name: loss_at(curve, tokens) for name, curve in point["losses"].items()} for point in points]
    return _against_control(study, points, found)


def at_equal_compute(study: Mapping, points: Sequence[Mapping]) -> Reading:
    """Losses where each point has spent the FLOPs of the cheapest, selection included. ``points``: of one seed."""
    budget = min(point["cost"]["flops"][-1][1] for point in points)
    return _against_control(study, points, [_losses_for(point, budget) for point in points])


def trained_on(study: Mapping, points: Sequence[Mapping]) -> Reading:
    """Losses where each point ends, against those of the longer runs where they have spent the same FLOPs.

    points: of one seed, without the longer runs, which are read from ``study``.
    """
    budgets = {label(point): point["cost"]["flops"][-1][1] for point in points}
    losses = {label(point): _losses_for(point, budgets[label(point)]) for point in points}
    arms = sorted(study["longer"], key=lambda arm: arm != study["control"].split("/")[1])
    rivals = {}
    for arm in arms:
        curves = [one for one in study["points"] if label(one) == study["longer"][arm]]
        curves = [one for one in curves if one["seed"] == points[0]["seed"]]
        rivals[arm] = {place: _losses_for(one, budget) for one in curves for place, budget in budgets.items()}
    return Reading(losses, rivals)


def _losses_for(point: Mapping, flops: float) -> dict[str, float | None]:
    """A point's losses where it has spent so many FLOPs in all; None beyond its end."""
    return {name: loss_at(loss_by_cost(point, name, "flops"), flops) for name in point["losses"]}


def _against_control(study: Mapping, points: Sequence[Mapping], losses: Sequence[Losses]) -> Reading:
    """A reading in which all points are held against the control's losses."""
    by_label = {label(point): one for point, one in zip(points, losses, strict=True)}
    control = by_label.get(study["control"], {})
    return Reading(by_label, {study["control"].split("/")[1]: dict.fromkeys(by_label, control)})


Read = Callable[[Mapping, Sequence[Mapping]], Reading]


def readings(study: Mapping) -> dict[str, Read]:
    """Where curves are read, the points of one seed together."""
    return {"equal tokens": at_equal_tokens, "equal total compute": trained_on if study["longer"] else at_equal_compute}


def results(study: Mapping) -> dict[str, dict[str, dict]]:
    """{reading: {VARIANT/ARM: {"guided": Compared of the sets' mean, "other": the same, "sets": {set: Compared},
    "rivals": {arm: Compared of the guided sets' mean}}}}. All but ``rivals`` are held against the control."""
    return {name: _read(study, read) for name, read in readings(study).items()}


def _read(study: Mapping, read: Read) -> dict[str, dict]:
    points = [point for point in study["points"] if label(point) not in study["longer"].values()]
    seeds = {seed: [point for point in points if point["seed"] == seed] for seed in study["seeds"]}
    found = {seed: read(study, own) for seed, own in seeds.items() if own}
    return {arm: _row(study, found, arm) for arm in dict.fromkeys(map(label, points))}


def _row(study: Mapping, found: Mapping[int, Reading], arm: str) -> dict:
    """What :func:`results` says of one arm; found: the reading of each seed."""
    losses = {seed: one.losses[arm] for seed, one in found.items() if arm in one.losses}
    control, *others = next(iter(found.values())).rivals

    def against(names: Sequence[str], rival: str) -> Compared:
        return _compare_means(losses, {seed: found[seed].rivals[rival].get(arm, {}) for seed in losses}, names)

    return {
        "guided": against(study["guided"], control),
        "other": against(study["other"], control),
        "sets": {name: against([name], control) for name in (*study["guided"], *study["other"])},
        "rivals": {rival: against(study["guided"], rival) for rival in others},
    }


def label(point: Mapping) -> str:
    """VARIANT/ARM."""
    return f"{point['variant']}/{point['arm']}"


def _compare_means(arm: Mapping[int, Losses], control: Mapping[int, Losses], names: Sequence[str]) -> Compared:
    return compare(_means(arm, names), _means(control, names))


def _means(by_seed: Mapping[int, Losses], names: Sequence[str]) -> dict[int, float | None]:
    """The mean over some sets, for each seed."""
    return {seed: spread([losses.get(name) for name in names]).mean for seed, losses in by_seed.items()}
