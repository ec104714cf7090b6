"""Parts of a corpus by ``data.split``, and corpora blended in: what the options say, and whether it can work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bliss.config.data import DataConfig

PARTS = ("train", "validation", "test")
"""What ``data.split`` divides a corpus into."""


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, validation and test of a split such as "949,50,1" (of any sum); ValueError where it is none."""
    try:
        numbers = [float(number) for number in split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(PARTS) or not all(0 <= number < float("inf") for number in numbers) or not numbers[0]:
        raise ValueError(
            f"found data.split {split!r}, expected three numbers for train, validation and test of which the first is "
            "above 0, such as 949,50,1"
        )
    total = sum(numbers)
    return tuple(number / total for number in numbers)


def split_bounds(num_units: int, shares: Sequence[float]) -> list[int]:
    """Where each part of a corpus ends, in index order: units [0, b0), [b0, b1), [b1, num_units)."""
    return [round(num_units * sum(shares[: number + 1])) for number in range(len(shares) - 1)] + [num_units]


def blend(data: DataConfig) -> list[tuple[str, float]]:
    """Corpora that the target trains on beside every selection, and each one's share of the sequences."""
    return list(zip(data.blend_prefixes, data.blend_weights, strict=True))


def check_blend(data: DataConfig) -> None:
    """ValueError for a split that is none, or a blend that leaves nothing to the selection."""
    parse_split(data.split)
    weights = data.blend_weights
    if len(weights) != len(data.blend_prefixes) or sum(weights) >= 1:
        raise ValueError(
            f"found data.blend_weights {weights} for {len(data.blend_prefixes)} data.blend_prefixes, expected one for "
            "each, with a sum below 1 that leaves the rest of the sequences to the selection"
        )


def check_set_names(data: DataConfig) -> None:
    """ValueError for two held-out sets of one name: results would hold only one of them."""
    first: dict[str, str] = {}
    for prefix in [*data.test_prefixes, *data.other_prefixes]:
        name = Path(prefix).name
        if name in first:
            raise ValueError(
                f"found {first[name]!r} and {prefix!r} in data.test_prefixes and data.other_prefixes, expected a last "
                "part of its own for each, which names the set in results: name or link one of them otherwise"
            )
        first[name] = prefix


def check_guide(data: DataConfig) -> None:
    """ValueError for weights that are not one a set, and for two sets of one name, of the guide or held against it."""
    prefixes, weights = data.guide_prefixes, data.guide_weights
    if weights and len(weights) != len(prefixes):
        raise ValueError(
            f"found {len(weights)} data.guide_weights for {len(prefixes)} sets in data.validation_prefix, expected one "
            "for each, or none"
        )
    names = [Path(prefix).name for prefix in [*prefixes, *data.reference_prefixes]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        options = "data.validation_prefix" + " and data.reference_prefix" * bool(data.reference_prefixes)
        raise ValueError(
            f"found {', '.join(twice)} more than once among the last parts of {options}, expected a last "
            "part of its own for each, which names the set in results: name or link one of them otherwise"
        )


def check_sets(data: DataConfig) -> None:
    """ValueError where the run would lack a set to be guided by or to be measured on."""
    _, validation, test = parse_split(data.split)
    if not data.guide_prefixes and not validation:
        raise ValueError(
            "found no data.validation_prefix, expected the guide of the selection: set it, or give the "
            "corpus's own part by data.split, such as 949,50,1"
        )
    if not data.test_prefixes and not test:
        raise ValueError(
            "found no data.test_prefixes, expected at least one held-out set to measure the arms on: set it, or give "
            "the corpus's own part by data.split, such as 949,50,1"
        )
