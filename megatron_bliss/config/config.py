"""Every option of a run: frozen dataclasses, one section per part, filled from YAML and the command line.

The text under a field is its ``--help``. Field names follow Megatron-LM where it has the option. A module of the
package receives its own section, never the whole :class:`Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.bounds import bounded
from megatron_bliss.config.data import DataConfig
from megatron_bliss.config.evaluation import EvaluationConfig
from megatron_bliss.config.models import ProxyConfig, ScoreConfig, TargetConfig
from megatron_bliss.config.output import CheckpointConfig, LoggingConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.config.selection import ScoringConfig, SelectionConfig
from megatron_bliss.config.stages import Stage
from megatron_bliss.config.training import PretrainingConfig


@dataclass(frozen=True)
class Config:
    """Choose pre-training data by bilevel optimisation and pre-train a target on it."""

    run_folder: str = ""
    """Everything a run writes goes here; running the same command again continues an unfinished run."""
    seed: int = bounded(1234, minimum=0, maximum=2**63 - 1)
    """Seed of initial weights, data order and random selection."""
    arms: Union[list[str], str] = field(default_factory=lambda: ["bliss", "random"])
    """Ways to score units, each with a target of its own, as a list or with commas between."""
    rounds: int = bounded(4, minimum=1)
    """R, rounds of [bilevel, score, select, pretrain, evaluate] after the warm-up."""
    stage: Optional[Stage] = None
    """Run this stage alone (its inputs must be finished)."""
    round: Optional[int] = bounded(None, minimum=0)
    """With --stage: the round, counted from 1 (0, with evaluate: the warm-up)."""
    arm: Optional[str] = None
    """With --stage: the arm."""
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    data: DataConfig = field(default_factory=DataConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    baselines: dict[str, Any] = field(default_factory=dict)
    """Options of arms: a section for each that has some."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        """``arms`` is a list from here on, however it was written."""
        if isinstance(self.arms, str):
            object.__setattr__(self, "arms", [name.strip() for name in self.arms.split(",") if name.strip()])
