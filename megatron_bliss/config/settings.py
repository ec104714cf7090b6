"""Settings of choices: every record of a table brings a dataclass of its own, and a section of options holds them all.

A field that several records have is one option, with one meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, get_type_hints

import docstring_parser

Settings = TypeVar("Settings")


class Choice(Protocol):
    """What a record of a table has at least."""

    help: str
    """What it is, in a few words."""
    settings: type | None
    """Dataclass of its settings: a default and a line of help (the text under it) per field; None: it has none."""


@dataclass(frozen=True)
class Setting:
    """One option of choices."""

    name: str
    type: Any
    default: Any
    help: str
    metadata: Mapping[str, Any]
    """Of its field: bounds."""
    choices: tuple[str, ...] = ()
    """Those that have it."""

    def described(self) -> str:
        """The help text on a command line."""
        return f"{', '.join(self.choices)}: {self.help[:1].lower()}{self.help[1:]}"


def settings_of(cls: type) -> dict[str, Setting]:
    """The fields of a dataclass by name, those that it inherits first."""
    bases = [base for base in reversed(cls.__mro__) if is_dataclass(base)]
    texts = {one.arg_name: one.description for base in bases for one in docstring_parser.parse_from_object(base).params}
    types = get_type_hints(cls)
    found = {}
    for one in fields(cls):
        help_text = " ".join((texts.get(one.name) or "").split())
        found[one.name] = Setting(one.name, types[one.name], _default(one), help_text, one.metadata)
    return found


def merged_settings(table: Mapping[str, Choice]) -> dict[str, Setting]:
    """The settings of all records of a table by name, each with the records that have it."""
    found: dict[str, Setting] = {}
    for choice, record in table.items():
        for name, one in settings_of(record.settings).items() if record.settings is not None else ():
            others = found[name].choices if name in found else ()
            found[name] = replace(one, choices=(*others, choice))
    return found


def pick(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings ``cls`` out of those of a whole table; what is not given has its default."""
    return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})


def _default(one: Field) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
