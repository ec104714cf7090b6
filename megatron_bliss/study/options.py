"""Nested options of runs, and variants that a sweep makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WITHOUT_CONTROL = ("bilevel", "score", "scoring", "baselines")
"""Sections that the control has no part in: where an option of these is swept, it runs once."""


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with those of ``second`` over those of ``first``."""
    result = dict(first)
    for name, value in second.items():
        before = result.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[name] = merged(before, value) if both else value
    return result


def nested(options: Mapping[str, Any]) -> dict:
    """``{"selection.fraction": 0.2}`` as ``{"selection": {"fraction": 0.2}}``."""
    result: dict = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        one = {last: value}
        for section in reversed(sections):
            one = {section: one}
        result = merged(result, one)
    return result


def swept_name(variant: str, option: str, value: object) -> str:
    """Such as ``upper_iters_60``, or ``ngram_upper_iters_60`` of the variant ``ngram``."""
    return "_".join(filter(None, (variant, option.rsplit(".", 1)[-1], str(value))))


def swept_variants(
    option: str, values: Sequence[Any], variants: Mapping[str, Mapping], arms: Sequence[str], control: str
) -> dict[str, dict]:
    """Every variant with every value of an option, under its :func:`swept_name`.

    variants: those of the study, ``{"": {}}`` for none. Where the option is of :data:`WITHOUT_CONTROL`, the arm
    ``control`` runs with the first value only.
    """
    made: dict[str, dict] = {}
    for name, options in variants.items():
        for number, value in enumerate(values):
            own = list(options.get("arms", arms))
            if number and option.split(".")[0] in WITHOUT_CONTROL:
                own = [arm for arm in own if arm != control] or own
            made[swept_name(name, option, value)] = merged(options, nested({option: value})) | {"arms": own}
    return made
