"""The option that the variants of a study change, and its value in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_bliss.config.parse import to_dict
from megatron_bliss.study.runs import StudyRun

FEWEST = 3
"""Values that a plot over an option needs."""


def read_sweep(variants: Mapping[str, Mapping], runs: Sequence[StudyRun], given: Mapping) -> dict | None:
    """{"option": its name, "points": {variant: [series, value]}} of the option that variants change; None without one.

    given: {"option", "series": {variant: series}} of a study with the key ``sweep``; else empty: then it is the option
    that most variants change as the only one, and the variants that change nothing have their value, too. Variants that
    change others are left out, and so is an option with fewer than three different numbers.
    """
    configs = {run.variant: to_dict(run.config) for run in runs}
    option, series = given.get("option") or _changed_alone(variants), given.get("series")
    if option is None:
        return None
    if series is None:
        series = {name: "" for name, options in variants.items() if _changes(options) in ([option], [])}
    points = {name: [part, _value(configs[name], option)] for name, part in series.items() if name in configs}
    points = {name: point for name, point in points.items() if _is_number(point[1])}
    return {"option": option, "points": points} if len({value for _, value in points.values()}) >= FEWEST else None


def _changed_alone(variants: Mapping[str, Mapping]) -> str | None:
    """The option that most variants change as the only one; None where no two do."""
    alone = [changed[0] for options in variants.values() if len(changed := _changes(options)) == 1]
    most = max(alone, key=alone.count, default=None)
    return most if alone.count(most) > 1 else None


def _changes(options: Mapping, before: str = "") -> list[str]:
    """Dotted names of the options that a variant changes; which arms it runs is none of them."""
    found = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found += _changes(value, f"{before}{name}.")
        elif before or name != "arms":
            found.append(before + name)
    return found


def _value(config: Mapping, option: str) -> object:
    value: object = config
    for name in option.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
