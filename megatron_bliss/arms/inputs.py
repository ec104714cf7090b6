"""What an arm is given to score a shard by, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_bliss.config.training import OptimizerConfig

if TYPE_CHECKING:  # arms' files are imported to read options, these take seconds
    from megatron_bliss.base.parallel import Groups
    from megatron_bliss.data.batches import BatchSource, UnitDataset
    from megatron_bliss.models.loop import Trainer
    from megatron_bliss.models.presets import Architecture
    from megatron_bliss.models.score import ScoreModel
    from megatron_bliss.models.transformer import LanguageModel
    from megatron_bliss.scorers.scorer import WindowScorer
    from megatron_bliss.target.model import Target
    from megatron_bliss.target.state import Moments


@dataclass(frozen=True)
class Inputs:
    """One round of one arm, on this rank.

    An arm is called on every rank. It scores all of ``source``, the round's shard, by what it learns from
    ``reference``, the guide of the selection.
    """

    source: UnitDataset
    reference: BatchSource
    train_prefix: str
    """The corpus that the shard was dealt from."""
    eod: int
    """Id of the token that ends documents."""
    seed: int
    folder: Path
    """For results of a part of the work, so that a killed stage goes on; removed when the scores are written."""
    groups: Groups
    micro_batch_size: int
    """Units per forward pass and rank."""
    show_progress: bool
    description: str
    """Begins every line of progress."""
    load_target: Callable[[], Target]
    """The arm's target as the round before left it, not to be trained; collective. In fp32 whatever the run's
    precision: bf16 would round small steps away."""
    load_moments: Callable[[Target], Moments]
    """The Adam moments that were saved with it; collective."""
    target_architecture: Architecture
    target_optimizer: OptimizerConfig
    """How the target is trained."""
    load_proxy: Callable[[], tuple[LanguageModel, dict]]
    """The warmed-up proxy in the precision of scoring, and what ``scores.json`` says of it."""
    load_score_model: Callable[[], tuple[ScoreModel, dict]]
    """The score model of this round's bilevel stage in fp32, and what ``scores.json`` says of it."""
    load_tied_proxy: Callable[[], tuple[LanguageModel, dict]]
    """The proxy of this round's bilevel stage in fp32, where that trains no score model, and its Adam state
    (bilevel/tied.py, ``learned``)."""
    new_score_model: Callable[[], ScoreModel]
    """A regressor for units: the warmed-up proxy's trunk with a new linear unit, no activation."""
    train: Callable[[Trainer, int], None]
    """Take a trainer to so many steps, logged and saved on the way as a stage's own training is; collective."""
    params_dtype: str = "fp32"
    """Precision of the trunk of a score model that reads the shard."""

    @property
    def vocab_size(self) -> int:
        """Ids that tokens of the shard may have: below this."""
        known = self.source.vocab_size
        return int(self.source.corpus.tokens.max(initial=0)) + 1 if known is None else known


@dataclass(frozen=True)
class Scores:
    """float32 [units], all finite, higher is better: on the main rank; what made them; model FLOPs of it; what was
    warned of; and what was learned, where it can score any other text."""

    values: np.ndarray | None
    settings: dict = field(default_factory=dict)
    flops: float = 0.0
    warnings: list[str] = field(default_factory=list)
    scorer: WindowScorer | None = field(default=None, compare=False)
