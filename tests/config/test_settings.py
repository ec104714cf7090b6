"""Settings of choices: every field with its help, inherited ones too; those of a table merged, and picked out again."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_bliss.config.settings import merged_settings, pick, settings_of


@dataclass(frozen=True)
class Colour:
    """How it looks."""

    hue: float = 0.5
    """Place on the
    wheel."""


@dataclass(frozen=True)
class Pattern(Colour):
    """How it looks from near."""

    stripes: dict[str, int] = field(default_factory=dict)
    """Stripes per colour."""


@dataclass(frozen=True)
class Record:
    """A choice."""

    help: str
    settings: type


TABLE = {"plain": Record("one colour", Colour), "striped": Record("many", Pattern)}


def test_a_field_has_its_type_default_and_help() -> None:
    found = settings_of(Pattern)
    assert list(found) == ["hue", "stripes"]
    assert (found["hue"].type, found["hue"].default, found["hue"].help) == (float, 0.5, "Place on the wheel.")
    assert (found["stripes"].type, found["stripes"].default) == (dict[str, int], {})


def test_a_field_of_several_choices_is_one_setting_that_names_them() -> None:
    found = merged_settings(TABLE)
    assert list(found) == ["hue", "stripes"]
    assert found["hue"].described() == "plain, striped: place on the wheel."
    assert found["stripes"].choices == ("striped",)


def test_the_settings_of_one_choice_are_picked_out_of_all() -> None:
    given = {"hue": 0.25, "stripes": {"red": 2}}
    assert pick(Colour, given) == Colour(0.25)
    assert pick(Pattern, given) == Pattern(0.25, {"red": 2})
    assert pick(Pattern, {}) == Pattern()
