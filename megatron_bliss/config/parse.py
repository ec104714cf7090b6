"""From the command line and YAML to a :class:`Config`: ``--config file.yaml`` first, single options over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_bliss.config.bounds import bounded_fields
from megatron_bliss.config.config import Config

ROUND_STAGES = ("bilevel", "score", "select", "pretrain", "decay_branch", "evaluate")


@dataclass(frozen=True)
class Section:
    """Options that the records of a table bring along: ``--FIELD.NAME.OPTION`` is an option of record NAME."""

    field: str
    """Of Config: it becomes {record: its options}."""
    settings: Mapping[str, type]
    """{record: dataclass of its options}, without records that have none."""
    chosen_by: str
    """Option that names records."""
    help: Mapping[str, str]
    """{record: what it is, in a line}, for the help of that option."""


def parse_options(arguments: Sequence[str] | None, sections: Sequence[Section]) -> Config:
    """Read the command line (``sys.argv`` where it is None); what cannot work together is not checked here."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "pretrain_bliss.py --config FILE [--option VALUE ...]"
    parser = ArgumentParser(prog="pretrain_bliss.py", usage=usage, description=Config.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(Config, as_group=False, fail_untyped=True, skip={one.field for one in sections})
    for section in sections:
        for name, settings in section.settings.items():
            parser.add_class_arguments(settings, f"{section.field}.{name}", fail_untyped=True)
        _list_records(parser, section)
    _show_bounds(parser, sections)
    namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    options = vars(parser.instantiate(namespace))
    return Config(**options | {one.field: dict(vars(options[one.field])) for one in sections if one.settings})


def _list_records(parser: ArgumentParser, section: Section) -> None:
    """End the help of the option that names records with what they are."""
    lines = "; ".join(f"{name}: {line}" for name, line in section.help.items())
    for action in parser._actions:  # argparse has no public way to them
        if action.dest == section.chosen_by:
            action.help = f"{action.help} {lines}."


def _show_bounds(parser: ArgumentParser, sections: Sequence[Section]) -> None:
    """Put the bounds of each option behind its line of help."""
    defaults = {one.field: {name: settings() for name, settings in one.settings.items()} for one in sections}
    bounds = {name: bounds for name, _, bounds in bounded_fields(Config(**defaults))}
    for action in parser._actions:  # argparse has no public way to them
        if action.dest in bounds:
            action.help = f"{action.help} [{bounds[action.dest]}]"


def to_dict(config: Config) -> dict:
    """The configuration as plain nested dicts."""
    return dataclasses.asdict(config)


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``--config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
