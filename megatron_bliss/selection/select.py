"""From a scored corpus to the units that are kept: brings a policy what it needs to know beside the scores."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from megatron_bliss.config.bounds import check_bounds
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.config.settings import merged_settings, pick
from megatron_bliss.selection.fraction import as_many_of
from megatron_bliss.selection.near_duplicates import without_near_duplicates
from megatron_bliss.selection.policies import POLICIES
from megatron_bliss.selection.policy import Domains
from megatron_bliss.selection.units import CorpusUnits, Units


def in_round(selection: SelectionConfig, number: int) -> SelectionConfig:
    """The selection of a run's round ``number``, counted from 1: with the schedule's fraction, where there is one."""
    if not selection.fraction_schedule:
        return selection
    fraction = selection.fraction_schedule[number - 1]
    return replace(selection, settings=selection.settings | {"fraction": fraction})


def chosen_settings(selection: SelectionConfig, round_tokens: int | None = None) -> Any:
    """The settings of the chosen policy, for a target that trains on ``round_tokens`` in one round (None: no run)."""
    policy = POLICIES[selection.policy]
    settings = pick(policy.settings, selection.settings)
    return settings if round_tokens is None else policy.in_a_run(settings, round_tokens)


def selection_in_words(selection: SelectionConfig) -> str:
    """The policy of a run, its settings, and what they come to; ValueError for settings out of bounds."""
    policy, settings = POLICIES[selection.policy], chosen_settings(selection)
    check_bounds(settings, "selection")
    given = ", ".join(
        f"{name} {value:g}" for name, value in asdict(settings).items() if isinstance(value, (int, float))
    )
    parts = [f"{selection.policy} ({given}): {policy.help}" if given else f"{selection.policy}: {policy.help}"]
    return "; ".join([*parts, *filter(None, [policy.why(settings)])])


def apply_policy(
    prefix: str | os.PathLike,
    scores: np.ndarray,
    selection: SelectionConfig,
    *,
    seed: int,
    excluded: np.ndarray | None = None,
    round_tokens: int | None = None,
) -> tuple[np.ndarray, dict, str]:
    """:func:`apply_to_units` of a scored corpus or subset."""
    units = CorpusUnits(prefix)
    return apply_to_units(units, scores, selection, seed=seed, excluded=excluded, round_tokens=round_tokens)


def apply_to_units(
    units: Units,
    scores: np.ndarray,
    selection: SelectionConfig,
    *,
    seed: int,
    excluded: np.ndarray | None = None,
    round_tokens: int | None = None,
) -> tuple[np.ndarray, dict, str]:
    """Units that the policy keeps: (ids int64[k] increasing, policy for the manifest, label).

    scores: float[n], one per unit. excluded: unit numbers that are taken out first; a fraction is then one of the rest.
    round_tokens: those that the target trains on in one round, in a run. The policy's record for the manifest has its
    settings, the seed and the lowest score kept. Near-duplicates of better units are taken out before the policy sees
    the scores, so that it need not know of them, but a fraction stays one of all units. Raises ValueError when nothing
    is kept, and for near-duplicates of units without tokens.
    """
    remaining = None if excluded is None else _without(excluded, len(scores), units.name)
    if remaining is not None:
        scores = scores[remaining]
    policy, settings = POLICIES[selection.policy], chosen_settings(selection, round_tokens)
    applied, found = settings, {}
    if selection.near_duplicates:
        before = len(scores)
        ids = np.arange(before) if remaining is None else remaining
        stays = without_near_duplicates(units.corpus(), ids, scores, selection.near_duplicates, seed=seed)
        remaining, scores = ids[stays], scores[stays]
        applied = as_many_of(settings, before, len(scores))
        found = {"near_duplicates": selection.near_duplicates, "near_duplicates_left_out": before - len(scores)}
    ids = policy.keep(scores, applied, seed=seed, **_needs(units, selection, remaining))
    if not len(ids):
        raise ValueError(
            f"policy {selection.policy} keeps no unit of {units.name}, whose scores go from {scores.min():g} to "
            f"{scores.max():g}, expected at least one: {_to_keep_more(selection)}"
        )
    lowest = {policy.lowest_score_as: float(scores[ids].min())}
    record = {"name": selection.policy, **asdict(settings), "seed": seed, **lowest, **policy.measure(scores, settings)}
    return (ids if remaining is None else remaining[ids]), record | found, policy.label(settings).replace(".", "p")


def _needs(units: Units, selection: SelectionConfig, kept: np.ndarray | None) -> dict[str, Any]:
    """What the policy must know of the units beside their scores; kept: of these units only (None: of all)."""
    needs, found = POLICIES[selection.policy].needs, {}
    if "lengths" in needs:
        lengths = units.lengths()
        found["lengths"] = lengths if kept is None else lengths[kept]
    if "domains" in needs:
        numbers, names = units.domains(domain_field(selection))
        found["domains"] = Domains(numbers if kept is None else numbers[kept], names)
    return found


def selection_lines(record: dict) -> list[str]:
    """Lines for the user on a selection, or on each part of a combined one; record: the policy in the manifest."""
    lines = []
    for part in record.get("parts", [record]):
        lines.append(POLICIES[part["name"]].describe(part))
        if "near_duplicates" in part:
            lines.append(f"left out: {part['near_duplicates_left_out']:,} near-duplicates of units with a better score")
    return [line for line in lines if line is not None]


def domain_field(selection: SelectionConfig) -> str | None:
    """Column of the corpus's provenance that the policy looks at; None: it looks at none."""
    needs_one = "domains" in POLICIES[selection.policy].needs
    return chosen_settings(selection).domain_field if needs_one else None


def kept_share(selection: SelectionConfig, tokens: float, round_tokens: int) -> float | None:
    """About the share of a shard of ``tokens`` tokens that the policy keeps in a run; None: the scores decide."""
    return POLICIES[selection.policy].share(chosen_settings(selection, round_tokens), tokens)


def check_selection(selection: SelectionConfig) -> None:
    """Refuse settings that cannot work whatever the corpus; errors name the option."""
    check_bounds(selection, "selection")
    if selection.policy not in POLICIES:
        raise ValueError(f"found selection.policy {selection.policy!r}, expected one of {', '.join(POLICIES)}")
    known = merged_settings(POLICIES)
    for name in selection.settings:
        if name not in known:
            raise ValueError(f"found selection.{name}, which no policy has, expected settings of {', '.join(known)}")
    for name, policy in POLICIES.items():
        settings = pick(policy.settings, selection.settings)
        check_bounds(settings, "selection")
        policy.check(settings, name == selection.policy)


def check_schedule(selection: SelectionConfig, rounds: int) -> None:
    """Refuse a schedule that has not one fraction a round, or that the policy would not look at."""
    schedule = selection.fraction_schedule
    if schedule and len(schedule) != rounds:
        raise ValueError(
            f"found selection.fraction_schedule {schedule} for {rounds} rounds, expected one fraction for each: change "
            "it, or rounds"
        )
    if schedule and not hasattr(chosen_settings(selection), "fraction"):
        raise ValueError(
            f"found selection.fraction_schedule {schedule} with selection.policy {selection.policy}, expected a policy "
            "that keeps a fraction: change one of them"
        )


def repetition_warnings(
    train_tokens: int, selected_tokens: int, selection: SelectionConfig, *, keeps_all: bool = False
) -> list[str]:
    """A line for the user when training repeats a selection more often than ``selection.epoch_warning``; [] otherwise.

    keeps_all: there is nothing more to keep. Repeating data up to about four times costs little, after that it is worth
    less and less (arXiv 2305.16264).
    """
    epochs = train_tokens / selected_tokens
    if epochs <= selection.epoch_warning:
        return []
    more = "" if keeps_all else f"{_to_keep_more(selection)}, "
    return [
        f"the target will train on {train_tokens:,} tokens of a selection that has {selected_tokens:,}: {epochs:.1f} "
        f"epochs, more than selection.epoch_warning={selection.epoch_warning:g}; "
        f"{more}lower pretraining.train_iters, or prepare more data"
    ]


def _to_keep_more(selection: SelectionConfig) -> str:
    """What to change for more units, as messages say it."""
    text = POLICIES[selection.policy].to_keep_more
    return text.replace("selection.fraction", "selection.fraction_schedule") if selection.fraction_schedule else text


def _without(excluded: np.ndarray, count: int, prefix: str | os.PathLike) -> np.ndarray:
    """int64: the numbers of the units that are not excluded."""
    excluded = np.asarray(excluded, dtype=np.int64)
    if len(excluded) and not (excluded.min() >= 0 and excluded.max() < count):
        raise ValueError(f"excluded units {excluded.min()} to {excluded.max()}, but {prefix} has 0 to {count - 1}")
    kept = np.ones(count, dtype=bool)
    kept[excluded] = False
    if not kept.any():
        raise ValueError(f"all {count} units of {prefix} are excluded, expected some to choose from: change --exclude")
    return np.flatnonzero(kept)
