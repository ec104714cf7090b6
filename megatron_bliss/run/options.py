"""The options of a run: those of config/, and those that the arms bring along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bliss.arms import ARMS
from megatron_bliss.config import parse
from megatron_bliss.config.config import Config


def read_config(path: Path | str) -> Config:
    """Read the ``config.yaml`` of a run; unlike for a new run, its data need not lie on this machine."""
    return parse_options(["--config", str(path)])


def parse_options(arguments: Sequence[str] | None) -> Config:
    """Read the command line (``sys.argv`` where it is None) without the checks of what cannot work."""
    return parse.parse_options(arguments, [_arms()])


def _arms() -> parse.Section:
    settings = {name: arm.settings for name, arm in ARMS.items() if arm.settings is not None}
    return parse.Section("baselines", settings, "arms", {name: arm.help for name, arm in ARMS.items()})
