"""From the command line and YAML to a :class:`Config`: ``--config file.yaml`` first, single options over it.

Which choices there are, and so which options, is known in rooms above: they hand in their tables.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_bliss.config.bounds import bounded_fields
from megatron_bliss.config.config import Config
from megatron_bliss.config.settings import Choice, Setting, merged_settings, settings_of

Tables = Mapping[str, Mapping[str, Choice]]
"""Option that makes a choice → the records to choose from.

A choice of one, such as "selection.policy": the option's section keeps the settings of all records in its field
``settings``; to users, each setting is an option of the section like any other. A choice of several, such as "arms":
the settings of each record are a section of their own."""
SEVERAL = {"arms": "baselines"}
"""Option that chooses several records → field of :class:`Config` that holds {record: its settings}."""


def read_config(path: Path | str, tables: Tables) -> Config:
    """Read the ``config.yaml`` of a run; unlike for a new run, its data need not lie on this machine."""
    return parse_options(["--config", str(path)], tables)


def parse_options(arguments: Sequence[str] | None, tables: Tables) -> Config:
    """The command line (``sys.argv`` for None) as a configuration, without the checks of what cannot work."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "pretrain_bliss.py --config FILE [--option VALUE ...]"
    parser = ArgumentParser(prog="pretrain_bliss.py", usage=usage, description=Config.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    whole = _whole(tables)
    parser.add_class_arguments(whole, as_group=False, fail_untyped=True)
    _show_bounds(parser, whole())
    namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    # Copies: Python 3.13.0 loses attributes of an object that is gone from a dict that vars() gave of it.
    values, types = dict(vars(parser.instantiate(namespace))), get_type_hints(Config)
    gathered = {name: _gather(types[name], values[name]) for name in _choosing(tables)}
    gathered |= {section: dict(vars(values[section])) for section in _choosing_several(tables)}
    return Config(**(values | gathered))


def _choosing(tables: Tables) -> dict[str, dict[str, Mapping[str, Choice]]]:
    """{section: {its option that makes a choice of one: the records}}."""
    found: dict[str, dict[str, Mapping[str, Choice]]] = {}
    for option, table in tables.items():
        if option not in SEVERAL:
            section, _, choice = option.partition(".")
            found.setdefault(section, {})[choice] = table
    return found


def _choosing_several(tables: Tables) -> dict[str, str]:
    """{section of sections: option that chooses several}."""
    return {SEVERAL[option]: option for option in tables if option in SEVERAL}


def _whole(tables: Tables) -> type:
    """:class:`Config` as the command line shows it: a section with a choice has the settings of all its records."""
    options = settings_of(Config)
    for section, choices in _choosing(tables).items():
        shown = _section_options(options[section].type, choices)
        options[section] = dataclasses.replace(options[section], type=shown, default=shown())
    for section, choice in _choosing_several(tables).items():
        options[choice] = _with_records(options[choice], tables[choice])
        shown = _sections(options[section], tables[choice])
        options[section] = dataclasses.replace(options[section], type=shown, default=shown())
    return _options_class(Config, options, {name: one.help for name, one in options.items()})


def _section_options(section: type, choices: Mapping[str, Mapping[str, Choice]]) -> type:
    own = {name: one for name, one in settings_of(section).items() if name != "settings"}
    merged: dict[str, Setting] = {}
    for choice, table in choices.items():
        own[choice] = dataclasses.replace(_with_records(own[choice], table), type=Literal[tuple(table)])
        merged |= merged_settings(table)
    texts = {name: one.help for name, one in own.items()} | {name: one.described() for name, one in merged.items()}
    return _options_class(section, own | merged, texts)


def _with_records(option: Setting, table: Mapping[str, Choice]) -> Setting:
    """The option with what it chooses from at the end of its help."""
    names = "; ".join(f"{name}: {record.help}" for name, record in table.items())
    return dataclasses.replace(option, help=f"{option.help} {names}.")


def _sections(section: Setting, table: Mapping[str, Choice]) -> type:
    """A dataclass with the settings of each record that has some."""
    records = {name: record.settings for name, record in table.items() if record.settings is not None}
    parts = [(name, settings, field(default_factory=settings)) for name, settings in records.items()]
    return dataclasses.make_dataclass(section.name, parts, namespace={"__doc__": section.help})


def _options_class(like: type, options: Mapping[str, Setting], texts: Mapping[str, str]) -> type:
    """A dataclass with these fields; jsonargparse takes their lines of help from its docstring."""
    lines = "\n".join(f"    {name}: {text}" for name, text in texts.items() if text)
    parts = [
        (one.name, one.type, field(default_factory=partial(copy.copy, one.default), metadata=one.metadata))
        for one in options.values()
    ]
    return dataclasses.make_dataclass(
        like.__name__, parts, namespace={"__doc__": f"{like.__doc__}\n\nArgs:\n{lines}\n"}
    )


def _gather(section: type, values: object) -> object:
    """A section with the settings of choices in its field ``settings``."""
    given = vars(values)
    own = {one.name: given[one.name] for one in fields(section) if one.name in given}
    settings = {name: value for name, value in given.items() if name not in own}
    return section(**own, settings=settings) if settings else section(**own)


def _show_bounds(parser: ArgumentParser, options: object) -> None:
    """Put the bounds of each option behind its line of help."""
    bounds = {name: bounds for name, _, bounds in bounded_fields(options)}
    for action in parser._actions:  # argparse has no public way to them
        if action.dest in bounds:
            action.help = f"{action.help} [{bounds[action.dest]}]"


def to_dict(config: Config) -> dict:
    """The configuration as plain nested dicts; the settings of choices stand in their section."""
    return {name: _flat(value) for name, value in dataclasses.asdict(config).items()}


def _flat(section: object) -> object:
    if not isinstance(section, dict) or "settings" not in section:
        return section
    return {name: value for name, value in section.items() if name != "settings"} | section["settings"]


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``--config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
