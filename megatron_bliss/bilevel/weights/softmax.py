"""P_i = exp(s_i) / sum_j exp(s_j) over the global batch, as the paper has it; c_i = - P_i (d_i - sum_j P_j d_j)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.weights.weighting import GlobalBatch, Weighting

if TYPE_CHECKING:
    from torch import Tensor


def softmax(scores: Tensor, batch: GlobalBatch) -> Tensor:
    """P [b] of s [b]."""
    from megatron_bliss.bilevel.softmax import global_softmax

    return global_softmax(scores, batch.group, unit_ids=batch.unit_ids, micro_batch_size=batch.micro_batch_size)


def coefficients(scores: Tensor, weights: Tensor, influence: Tensor, batch: GlobalBatch) -> Tensor:
    """c [b]."""
    from megatron_bliss.bilevel.hypergradient import hypergradient_coefficients

    return hypergradient_coefficients(weights, influence, batch.group)


WEIGHTING = Weighting(
    help="of the scores a(f), over the global batch",
    weights=softmax,
    coefficients=coefficients,
    of_raw_scores=False,
    sums_to_one=True,
)
