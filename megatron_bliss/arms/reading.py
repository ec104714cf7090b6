"""A shard is read: for arms that score it unit by unit, and those whose scores are a model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.base.parallel import Groups, all_gather_object, failing_together
from megatron_bliss.bilevel.hypergradient import score_batch
from megatron_bliss.data.batches import BatchSource, rank_share
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.models.score import NgramScoreModel, ScoreModel
from megatron_bliss.scorers.models import ModelScorer, Reading
from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer
from megatron_bliss.scorers.scorer import NotFinite, Scorer, WindowScorer
from megatron_bliss.scorers.units import flat_units
from megatron_bliss.selection.score_pass import ScorePass, gather_scores, score_blocks


def shard_pass(inputs: Inputs, name: str) -> ScorePass:
    """How this rank scores its part of the shard; ``name`` is what its line of progress says."""
    groups = inputs.groups
    return ScorePass(
        groups.rank,
        groups.world_size,
        show_progress=inputs.show_progress,
        description=f"{inputs.description} {name}",
    )


def score_by(score: Callable[[np.ndarray], np.ndarray], inputs: Inputs, blocks: Path, name: str) -> np.ndarray | None:
    """Scores of the whole shard, on the main rank, by a function from unit ids (int64 [n], in order) to scores [n].

    Each rank scores its part, into files of the folder ``blocks``.
    """
    groups = inputs.groups
    with failing_together(groups):
        score_blocks(score, len(inputs.source), blocks, shard_pass(inputs, name))
    with failing_together(groups):  # by now every rank has written its blocks
        return gather_scores(blocks, len(inputs.source)) if groups.is_main else None


def scorer_of(model: ScoreModel, inputs: Inputs) -> WindowScorer:
    """A score model as the scorer that reads the shard: its table alone, where that is all it has."""
    if isinstance(model, NgramScoreModel):
        table, parts = model.ngrams, model.score_architecture.ngrams
        form = NgramForm(parts.max_ngram, inputs.vocab_size, table.eod, activation=model.activation)
        return NgramScorer(form, parts.scale * table.table.detach().cpu().numpy()[:, 0])
    places = inputs.micro_batch_size * inputs.source.seq_length
    return ModelScorer(model, Reading(inputs.groups.device, places, inputs.params_dtype))


def score_by_scorer(scorer: WindowScorer, inputs: Inputs, blocks: Path, name: str) -> np.ndarray | None:
    """Scores of the whole shard, on the main rank; each rank scores its part, into files of the folder ``blocks``.

    Units are read as far as the target reads them.
    """
    score = shard_scores(scorer, inputs.source.corpus, inputs.source.seq_length, name)
    return score_by(score, inputs, blocks, name)


def shard_scores(
    scorer: WindowScorer, corpus: IndexedCorpus, length: int, name: str
) -> Callable[[np.ndarray], np.ndarray]:
    """From unit ids (int64 [n], one after another) to their scores [n], of the first ``length`` tokens of each."""
    reader = Scorer(scorer, length)

    def score(ids: np.ndarray) -> np.ndarray:
        try:
            return reader.score(*flat_units(corpus, int(ids[0]), int(ids[-1]) + 1, length))
        except NotFinite as error:
            raise FloatingPointError(
                f"found scores that are not finite for units {ids[error.places[:10]].tolist()}, expected numbers: what "
                f"{name} learned has diverged; lower its learning rate (bilevel.score_optimizer.lr of bliss) and run "
                "the round's stages again"
            ) from error

    return score


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
