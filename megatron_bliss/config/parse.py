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

from megatron_bliss.config.config import Config
from megatron_bliss.config.settings import Choice, Setting, merged_settings, settings_of

ROUND_STAGES = ("bilevel", "score", "select", "pretrain", "decay_branch", "evaluate")

Tables = Mapping[str, Mapping[str, Choice]]
"""Option that makes a choice, such as "selection.policy" → the records to choose from. The option's section keeps all
their settings in its field ``settings``; to users, each setting is an option of the section like any other."""


def read_config(path: Path | str, tables: Tables) -> Config:
    """Read the ``config.yaml`` of a run; unlike for a new run, its data need not lie on this machine."""
    return parse_options(["--config", str(path)], tables)


def parse_options(arguments: Sequence[str] | None, tables: Tables) -> Config:
    """The command line (``sys.argv`` for None) as a configuration, without the checks of what cannot work."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "pretrain_bliss.py --config FILE [--option VALUE ...]"
    parser = ArgumentParser(prog="pretrain_bliss.py", usage=usage, description=Config.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(_whole(tables), as_group=False, fail_untyped=True)
    namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    values, types = vars(parser.instantiate(namespace)), get_type_hints(Config)
    gathered = {name: _gather(types[name], values[name]) for name in _choosing(tables)}
    return Config(**(values | gathered))


def _choosing(tables: Tables) -> dict[str, str]:
    """{section: its option that makes a choice}."""
    return dict(option.split(".") for option in tables)


def _whole(tables: Tables) -> type:
    """:class:`Config` as the command line shows it: a section with a choice has the settings of all its records."""
    options = settings_of(Config)
    for section, choice in _choosing(tables).items():
        shown = _section_options(options[section].type, choice, tables[f"{section}.{choice}"])
        options[section] = dataclasses.replace(options[section], type=shown, default=shown())
    return _options_class(Config, options, {name: one.help for name, one in options.items()})


def _section_options(section: type, choice: str, table: Mapping[str, Choice]) -> type:
    own = {name: one for name, one in settings_of(section).items() if name != "settings"}
    names = "; ".join(f"{name}: {record.help}" for name, record in table.items())
    own[choice] = dataclasses.replace(own[choice], type=Literal[tuple(table)], help=f"{own[choice].help} {names}.")
    merged = merged_settings(table)
    texts = {name: one.help for name, one in own.items()} | {name: one.described() for name, one in merged.items()}
    return _options_class(section, own | merged, texts)


def _options_class(like: type, options: Mapping[str, Setting], texts: Mapping[str, str]) -> type:
    """A dataclass with these fields; jsonargparse takes their lines of help from its docstring."""
    lines = "\n".join(f"    {name}: {text}" for name, text in texts.items() if text)
    return dataclasses.make_dataclass(
        like.__name__,
        [(one.name, one.type, field(default_factory=partial(copy.copy, one.default))) for one in options.values()],
        namespace={"__doc__": f"{like.__doc__}\n\nArgs:\n{lines}\n"},
    )


def _gather(section: type, values: object) -> object:
    """A section with the settings of choices in its field ``settings``."""
    given = vars(values)
    own = {one.name: given[one.name] for one in fields(section) if one.name in given}
    return section(**own, settings={name: value for name, value in given.items() if name not in own})


def arm_names(config: Config) -> list[str]:
    """The arms of a run in the order given."""
    return [name.strip() for name in config.arms.split(",") if name.strip()]


def has_stage(config: Config, arm: str, stage: str) -> bool:
    """Whether a round of this arm has this stage."""
    if stage == "decay_branch":
        return config.pretraining.decay_branch_iters > 0
    return stage != "bilevel" or arm == "bliss"


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
