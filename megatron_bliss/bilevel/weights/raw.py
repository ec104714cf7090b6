"""P_i = f_i / n; c_i = - d_i / n.

A weight may be negative: the lower level then raises that sample's loss, and C (5) need not be positive semi-definite.
At f = 0, where a score model starts, the lower level is its KL and L2 terms alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bliss.bilevel.weights.weighting import GlobalBatch, Weighting, require_finite

if TYPE_CHECKING:
    from torch import Tensor


def raw(raw_scores: Tensor, batch: GlobalBatch) -> Tensor:
    """P [b] of f [b]."""
    require_finite(raw_scores, batch)
    return raw_scores / batch.num_samples


def coefficients(raw_scores: Tensor, weights: Tensor, influence: Tensor, batch: GlobalBatch) -> Tensor:
    """c [b]."""
    return -influence.double() / batch.num_samples


WEIGHTING = Weighting(help="f / n, which may be negative", weights=raw, coefficients=coefficients)
