"""A score model reads a shard: for arms whose scores are a model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.base.parallel import failing_together
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.selection.scoring import gather_scores, score_units


def score_by_model(model: ScoreModel, inputs: Inputs, blocks: Path, name: str) -> np.ndarray | None:
    """Scores of the whole shard, on the main rank; each rank scores its part, into files of the folder ``blocks``."""
    groups = inputs.groups
    with failing_together(groups):
        score_units(
            model,
            inputs.source,
            blocks,
            micro_batch_size=inputs.micro_batch_size,
            rank=groups.rank,
            world_size=groups.world_size,
            device=groups.device,
            show_progress=inputs.show_progress,
            description=f"{inputs.description} {name}",
        )
    with failing_together(groups):  # by now every rank has written its blocks
        return gather_scores(blocks, len(inputs.source)) if groups.is_main else None
