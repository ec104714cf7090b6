"""How near a score model without a table has come to the table that it starts from (bilevel/distillation.py).

Some units of the shard take no part in its training; the two models' scores of these are rank-correlated, because a
selection goes by ranks.
"""

from __future__ import annotations

import numpy as np

from megatron_bliss.arms.influence_model import spearman
from megatron_bliss.arms.reading import scores_of
from megatron_bliss.base.parallel import Groups
from megatron_bliss.data.batches import BatchSource, SampleOrder
from megatron_bliss.models.score import ScoreModel

MOST_HELD_BACK, HELD_BACK_SHARE = 1024, 0.1
"""Units held back at most, and as a share of the shard. 1,024 give a correlation of 0.9 to within 0.01."""
FEWEST_UNITS = 20
"""Of a shard, so that two are held back."""
NEAR = 0.8
"""A rank correlation below this is warned of: of the best fifth by the table, such scores miss a third."""


def held_back_units(num_units: int) -> int:
    """How many of a shard's units are held back."""
    return min(MOST_HELD_BACK, int(num_units * HELD_BACK_SHARE))


def split_units(num_units: int, needed: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(Units held back, at most ``needed`` others to train on), int64 each, drawn at random by ``seed``.

    Raises ValueError where the shard has fewer than FEWEST_UNITS.
    """
    if num_units < FEWEST_UNITS:
        raise ValueError(
            f"found {num_units} units in the shard, expected {FEWEST_UNITS} or more to train the score model on what "
            "counts say: use fewer rounds or a larger corpus, or set score.init_from proxy"
        )
    order, held_back = SampleOrder(num_units, seed), held_back_units(num_units)
    return order.ids(0, held_back), order.ids(held_back, min(num_units, held_back + needed))


def rank_correlation(
    model: ScoreModel, table: ScoreModel, source: BatchSource, units: np.ndarray, groups: Groups, micro_batch_size: int
) -> float:
    """Of two models' raw scores of ``units`` [n], the same on every rank; collective."""
    found, wanted = (scores_of(one, source, units, groups, micro_batch_size, raw=True) for one in (model, table))
    return spearman(found, wanted)


def distillation_warnings(correlation: float) -> list[str]:
    """What is to be warned of at such a rank correlation."""
    if correlation >= NEAR:
        return []
    return [
        f"the score model's scores have a rank correlation of {correlation:.3f} with those of the counts on units held "
        f"back, below {NEAR}: it has not learnt what counts say; raise score.distil_iters or "
        "score.distil_batch_size, or take score.family ngram or both (importance is learnt sooner than counts)"
    ]
