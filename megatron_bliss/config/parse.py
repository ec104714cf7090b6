"""From the command line and YAML to a :class:`Config`: ``--config file.yaml`` first, single options over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_bliss.config.bounds import bounded_fields
from megatron_bliss.config.config import Config


def read_config(path: Path | str) -> Config:
    """Read the ``config.yaml`` of a run; unlike for a new run, its data need not lie on this machine."""
    return parse_options(["--config", str(path)])


def parse_options(arguments: Sequence[str] | None) -> Config:
    """The same without the checks of what cannot work."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "pretrain_bliss.py --config FILE [--option VALUE ...]"
    parser = ArgumentParser(prog="pretrain_bliss.py", usage=usage, description=Config.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(Config, as_group=False, fail_untyped=True)
    _show_bounds(parser)
    namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    return Config(**vars(parser.instantiate(namespace)))


def arm_names(config: Config) -> list[str]:
    """The arms of a run in the order given."""
    return [name.strip() for name in config.arms.split(",") if name.strip()]


def has_stage(config: Config, arm: str, stage: str) -> bool:
    """Whether a round of this arm has this stage."""
    if stage == "decay_branch":
        return config.pretraining.decay_branch_iters > 0
    return stage != "bilevel" or arm == "bliss"


def _show_bounds(parser: ArgumentParser) -> None:
    """Put the bounds of each option behind its line of help."""
    bounds = {name: bounds for name, _, bounds in bounded_fields(Config())}
    for action in parser._actions:  # argparse has no public way to them
        if action.dest in bounds:
            action.help = f"{action.help} [{bounds[action.dest]}]"


def to_dict(config: Config) -> dict:
    """The configuration as plain nested dicts."""
    return dataclasses.asdict(config)


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``--config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
