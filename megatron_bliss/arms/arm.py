"""What an arm is: everything that a run and its plan have to know of one way to score units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.bilevel.scheme import ENGINE, Scheme
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.selection import ScoringConfig
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.score_architecture import ScoreArchitecture


@dataclass(frozen=True)
class Shard:
    """A round's shard as a plan knows it, and the models that may read it."""

    units: int
    tokens: int
    seq_length: int
    target: Architecture
    proxy: Architecture
    score: ScoreArchitecture
    """Parts of the score model."""
    reference_tokens: Callable[[int], int]
    """Samples of the guide -> their tokens."""


@dataclass(frozen=True)
class Sizes:
    """What the memory of a rank follows from."""

    seq_length: int
    target_config: TargetConfig
    target: Architecture
    proxy: Architecture
    target_weights: int
    """Elements of the target on the rank that holds most."""
    scoring: ScoringConfig
    """How a model reads a shard."""
    device: str
    """cpu or cuda."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank in a part of the score stage; working: of what a step makes and drops."""

    stage: str
    """Its name in the plan."""
    parameters: int
    gradients: int
    optimizer: int
    working: int
    advice: str
    """What to change where it does not fit."""


def accept_any(options: Any, train_prefix: str) -> None:
    """The check of an arm whose options need nothing on the disk."""


def reads_nothing(options: Any, shard: Shard) -> tuple[int, float]:
    """The work of an arm without a model."""
    return 0, 0.0


def as_they_are(options: BilevelConfig) -> BilevelConfig:
    """The options of an arm whose bilevel stage is the run's."""
    return options


@dataclass(frozen=True)
class Arm:
    """One way to score units: the record ``ARM`` at the end of its file.

    The file is imported to read the command line. What takes long to import (torch, megatron-core) is imported inside
    the functions that need it, and not for annotations either: jsonargparse runs blocks under TYPE_CHECKING.
    """

    help: str
    """What its scores are, in a line: for ``--help`` and README.md."""
    scores: Callable[[Any, Inputs], Scores]
    """(its options, one round) -> scores of the round's shard; called on every rank."""
    paper: str = ""
    """Number on arXiv."""
    settings: type | None = None
    """Frozen dataclass of its options, ``--baselines.NAME.OPTION``; the string under a field is its help."""
    check: Callable[[Any, str], None] = accept_any
    """(its options, data.train_prefix) -> ValueError where they cannot work with what lies on the disk."""
    keeps_all: bool = False
    """The target trains on all of a shard, whatever the policy of the run."""
    reads_proxy: bool = False
    """Its score stage looks at the warmed-up proxy."""
    stages: tuple[str, ...] = ()
    """Stages of its rounds that come before ``score``."""
    bilevel_options: Callable[[BilevelConfig], BilevelConfig] = as_they_are
    """The run's section ``bilevel`` -> that of the arm's bilevel stage; its help says what it fixes."""
    scheme: Scheme = ENGINE
    """How that stage is carried out."""
    work: Callable[[Any, Shard], tuple[int, float]] = reads_nothing
    """(its options, a shard) -> (tokens of the shard that a model reads, model FLOPs of the whole score stage)."""
    params_dtype: str | None = None
    """Precision of that work, where it is not scoring.params_dtype."""
    memory: Callable[[Any, Sizes], Memory] | None = None
    """(its options, sizes) -> what the score stage takes beside a score model's pass over the shard."""
