"""Tasks of a study's arms: accuracy, and bits per byte of the right answers, which tell where accuracies are noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_bliss.evaluation.results import measure
from megatron_bliss.study.cells import format_spread, table
from megatron_bliss.study.paired import Compared, compare, label

NOTE = (
    "Each arm at its end, zero-shot, {seeds}. In brackets: difference to `{control}`, seed by seed (bold where it is "
    "worse), and in how many seeds the arm is better. {tasks}."
)


class Measure(NamedTuple):
    """A number per task."""

    title: str
    scale: float
    higher_is_better: bool
    digits: int


MEASURES = {
    "accuracy": Measure("Accuracy on tasks, percent", 100.0, True, 1),
    "bits_per_byte": Measure("Bits per byte of the right answers", 1.0, False, 3),
}


def last_results(arm: Mapping) -> dict[str, dict[str, float | None]]:
    """{"accuracy": {task: value}, "bits_per_byte": {task: value}} at the end of an arm of a summary; {} without."""
    curves = {"accuracy": arm.get("tasks", {}), "bits_per_byte": arm.get("bits_per_byte", {})}
    found = {key: {name: curve[-1][1] for name, curve in tasks.items() if curve} for key, tasks in curves.items()}
    return {key: values for key, values in found.items() if values}


def tasks_section(study: Mapping) -> list[str]:
    """Blocks of the page: what was measured, and a table per measure; none without tasks."""
    points = [point for point in study["points"] if label(point) not in study["longer"].values()]
    facts, count = study.get("tasks", {}), len(study["seeds"])
    blocks = []
    for key, kind in MEASURES.items():
        names = list(dict.fromkeys(name for point in points for name in point.get("tasks", {}).get(key, {})))
        if names:
            blocks += [f"### {kind.title}", table([["arm", *names], *_rows(study, points, key, names)])]
    if not blocks:
        return []
    note = NOTE.format(
        seeds="mean ± standard error over the seeds" if count > 1 else "one seed alone",
        control=study["control"],
        tasks="; ".join(f"{name}: {measure(task)}" for name, task in facts.items()),
    )
    return ["## Tasks", note, *blocks]


def _rows(study: Mapping, points: Sequence[Mapping], key: str, names: Sequence[str]) -> list[list[str]]:
    kind, arms = MEASURES[key], dict.fromkeys(map(label, points))
    sign = -1.0 if kind.higher_is_better else 1.0

    def values(arm: str, name: str) -> dict[int, float | None]:
        """By seed, such that lower is better."""
        found = {one["seed"]: one.get("tasks", {}).get(key, {}).get(name) for one in points if label(one) == arm}
        return {seed: None if value is None else sign * kind.scale * value for seed, value in found.items()}

    return [
        [arm, *(_cell(compare(values(arm, name), values(study["control"], name)), kind, arm == study["control"])
                for name in names)]
        for arm in arms
    ]  # fmt: skip


def _cell(one: Compared, kind: Measure, is_control: bool) -> str:
    """Such as "43.4 ± 1.6 (+0.5 ± 0.2; 3/3)"."""
    sign = -1.0 if kind.higher_is_better else 1.0
    if one.value.mean is None:
        return "-"
    text = format_spread(one.value._replace(mean=sign * one.value.mean), digits=kind.digits)
    if is_control or one.difference.mean is None:
        return text
    difference = one.difference._replace(mean=sign * one.difference.mean)
    shown = format_spread(difference, sign="+", digits=kind.digits)
    shown = f"**{shown}**" if one.difference.mean > 0 else shown
    return f"{text} ({shown}; {one.wins}/{one.pairs})"
