"""A selection policy: one record that says which units are kept, by which settings, and what it must know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np


class Domains(NamedTuple):
    """Where the units of a corpus come from."""

    numbers: np.ndarray
    """int[n]: the domain of each unit, a place in ``names``."""
    names: list[str]


@dataclass(frozen=True)
class Policy:
    """One policy. Its options, help, checks, plan and manifest entry all follow from this record."""

    help: str
    """What it keeps, in a few words."""
    settings: type
    """Frozen dataclass with a default and a line of help per field; each field is an option ``selection.FIELD``. A
    field that another policy has, too, has the same meaning, type, default and help there. A policy that keeps a share
    inherits :class:`FractionSettings`: so it takes a schedule, and its count holds when near-duplicates go."""
    keep: Callable[..., np.ndarray]
    """``keep(scores, settings, *, seed, **needs)``: numbers of the kept units, int64[k] increasing, of float[n] scores.

    Pure, and the same for any number of ranks. Increasing, because Megatron's train/validation splits are contiguous in
    index order. Draws among units of equal score, and all else that is random, follow from ``seed``."""
    label: Callable[[Any], str]
    """``label(settings)``: a short word for the subset's name."""
    to_keep_more: str
    """What to change for more units, as messages say it: "raise selection.fraction"."""
    needs: tuple[Literal["lengths", "domains"], ...] = ()
    """What ``keep`` is given of the corpus: ``lengths``, int[n] tokens per unit; ``domains``, a :class:`Domains` by the
    provenance's column ``settings.domain_field``."""
    required: tuple[str, ...] = ()
    """Settings that have no good default outside of a run."""
    check: Callable[[Any, bool], None] = lambda settings, chosen: None
    """``check(settings, chosen)``: ValueError for settings that cannot work; ``chosen``: this policy selects."""
    in_a_run: Callable[[Any, int], Any] = lambda settings, round_tokens: settings
    """``in_a_run(settings, round_tokens)``: the settings for a target that trains on so many tokens in one round."""
    share: Callable[[Any, float], float | None] = lambda settings, tokens: None
    """``share(settings, tokens)``: about what part of so many tokens is kept, for plans; None: the scores decide."""
    lowest_score_as: str = "lowest_score_kept"
    """Name of the lowest score kept in the manifest."""
    measure: Callable[[np.ndarray, Any], dict[str, float]] = lambda scores, settings: {}
    """``measure(scores, settings)``: more numbers for the manifest, of the scores that ``keep`` was given."""
    why: Callable[[Any], str] = lambda settings: ""
    """``why(settings)``: what they come to and are good for, known before there are scores, for plans and reports."""
    describe: Callable[[dict], str | None] = lambda record: None
    """``describe(record)``: a line for the user on what the manifest says of a selection; None: no line."""
