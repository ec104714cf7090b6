"""Policies and their settings on the command line of a tool, as argparse takes them."""

from __future__ import annotations

import argparse

import yaml

from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.config.settings import Setting, merged_settings
from megatron_bliss.selection.policies import POLICIES
from megatron_bliss.selection.select import check_selection

SHARES = dict[str, float]
"""Settings of this type are given as NAME=SHARE words."""


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """``--policy`` and every setting of a policy."""
    policies = "; ".join(f"{name}: {policy.help}" for name, policy in POLICIES.items())
    parser.add_argument(
        "--policy", choices=list(POLICIES), default="top_fraction", help=f"which units are kept. {policies}"
    )
    for name, setting in merged_settings(POLICIES).items():
        parser.add_argument(f"--{name.replace('_', '-')}", **_flag(setting))


def given_selection(options: argparse.Namespace, near_duplicates: float = 0.0) -> SelectionConfig:
    """The section selection that the options come to; ValueError where they cannot work."""
    known = merged_settings(POLICIES)
    given = {name: getattr(options, name) for name in given_settings(options)}
    missing = [name for name in POLICIES[options.policy].required if name not in given]
    if missing:
        raise ValueError(f"policy {options.policy} needs --{missing[0].replace('_', '-')}")
    shares = {name: _parse_shares(name, value) for name, value in given.items() if known[name].type == SHARES}
    selection = SelectionConfig(options.policy, near_duplicates=near_duplicates, settings=given | shares)
    check_selection(selection)
    return selection


def given_settings(options: argparse.Namespace) -> list[str]:
    """Settings of policies that the command line has."""
    return [name for name in merged_settings(POLICIES) if getattr(options, name) is not None]


def _parse_shares(setting: str, entries: list[str]) -> SHARES:
    """{name: share} of NAME=SHARE entries."""
    try:
        return {name: float(share) for name, share in (entry.rsplit("=", 1) for entry in entries)}
    except ValueError as error:
        raise ValueError(
            f"{setting} {' '.join(entries)}, expected NAME=SHARE such as prose=0.5: --{setting.replace('_', '-')}"
        ) from error


def _flag(setting: Setting) -> dict:
    """How argparse takes a setting of policies."""
    required = any(setting.name in POLICIES[name].required for name in setting.choices)
    text = setting.described() if required else f"{setting.described()} Default: {setting.default}"
    text = text.replace("%", "%%")
    if setting.type == SHARES:
        return {"nargs": "+", "metavar": "NAME=SHARE", "help": text}
    return {"type": setting.type if setting.type in (int, float, str) else yaml.safe_load, "help": text}
