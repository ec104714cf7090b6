"""P_i = sigmoid(f_i) / n: every sample by itself, from 0 to 1 / n; c_i = - d_i sigmoid(f_i) sigmoid(- f_i) / n."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.weights.weighting import GlobalBatch, Weighting, require_finite

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid(raw_scores: Tensor, batch: GlobalBatch) -> Tensor:
    """P [b] of f [b]."""
    require_finite(raw_scores, batch)
    return (raw_scores.double().sigmoid() / batch.num_samples).to(raw_scores.dtype)


def coefficients(raw_scores: Tensor, weights: Tensor, influence: Tensor, batch: GlobalBatch) -> Tensor:
    """c [b]."""
    x = raw_scores.double()  # not by P (1 - n P): near P = 1 / n that is rounding
    return -influence.double() * x.sigmoid() * (-x).sigmoid() / batch.num_samples


WEIGHTING = Weighting(help="sigmoid(f) / n, each sample by itself", weights=sigmoid, coefficients=coefficients)
