"""Options of a run: the sections of config.py with the settings of every choice that the tables of the package hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bliss.arms import ARMS
from megatron_bliss.bilevel.guide_weightings import GUIDE_WEIGHTINGS
from megatron_bliss.bilevel.solvers import SOLVERS
from megatron_bliss.bilevel.weights import WEIGHTINGS
from megatron_bliss.config import parse
from megatron_bliss.config.config import Config
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.selection.policies import POLICIES

TABLES: parse.Tables = {
    "arms": ARMS,
    "score.family": FAMILIES,
    "bilevel.solver": SOLVERS,
    "bilevel.weights": WEIGHTINGS,
    "bilevel.guide_weighting": GUIDE_WEIGHTINGS,
    "selection.policy": POLICIES,
}
"""Option → the records that it chooses from."""


def parse_options(arguments: Sequence[str] | None) -> Config:
    """The command line (``sys.argv`` for None) as a configuration, without the checks of what cannot work."""
    return parse.parse_options(arguments, TABLES)


def read_config(path: Path | str) -> Config:
    """Read the ``config.yaml`` of a run; unlike for a new run, its data need not lie on this machine."""
    return parse.read_config(path, TABLES)
