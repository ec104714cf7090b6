"""A shard is read: for arms that score it unit by unit, and those whose scores are a model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.base.parallel import Groups, all_gather_object, failing_together
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.data.batches import BatchSource, rank_share
from megatron_bliss.models.score import ScoreModel
from megatron_bliss.selection.score_pass import ScorePass, gather_scores, score_blocks, score_units


def shard_pass(inputs: Inputs, name: str) -> ScorePass:
    """How this rank scores its part of the shard; ``name`` is what its line of progress says."""
    groups = inputs.groups
    return ScorePass(
        groups.rank,
        groups.world_size,
        groups.device,
        inputs.micro_batch_size,
        show_progress=inputs.show_progress,
        description=f"{inputs.description} {name}",
    )


def score_by(score: Callable[[np.ndarray], np.ndarray], inputs: Inputs, blocks: Path, name: str) -> np.ndarray | None:
    """:func:`score_by_model` by any function from unit ids (int64 [n], in order) to scores (float32 [n])."""
    groups = inputs.groups
    with failing_together(groups):
        score_blocks(score, len(inputs.source), blocks, shard_pass(inputs, name))
    with failing_together(groups):  # by now every rank has written its blocks
        return gather_scores(blocks, len(inputs.source)) if groups.is_main else None


def score_by_model(model: ScoreModel, inputs: Inputs, blocks: Path, name: str) -> np.ndarray | None:
    """Scores of the whole shard, on the main rank; each rank scores its part, into files of the folder ``blocks``."""
    groups = inputs.groups
    with failing_together(groups):
        score_units(model, inputs.source, blocks, shard_pass(inputs, name))
    with failing_together(groups):  # by now every rank has written its blocks
        return gather_scores(blocks, len(inputs.source)) if groups.is_main else None


def scores_of(
    model: ScoreModel,
    source: BatchSource,
    units: np.ndarray,
    groups: Groups,
    micro_batch_size: int,
    *,
    raw: bool = False,
) -> np.ndarray:
    """Scores [n] of ``units`` [n] of a source, the same on every rank; ``raw``: f_i instead. Collective.

    micro_batch_size: units per forward pass. For so few units that no file is needed.
    """
    start, stop = rank_share(len(units), groups.rank, groups.world_size)
    batch = source.batch(units[start:stop]).to(groups.device)
    mine = score_batch(model, batch, micro_batch_size=micro_batch_size, raw=raw).cpu().numpy()
    return np.concatenate(all_gather_object(mine, groups))
