"""The softmax over the global batch (eq. 2), synchronised over all ranks and micro-batches of one step.

(2) P_i = exp(s_i) / sum over j in the global batch of exp(s_j)

The largest score of all is taken off first: P stays the same and no exponential overflows. Shapes: b the scores of this
rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bliss.bilevel.finite_scores import largest_score


class _GlobalSoftmax(Function):
    """P = exp(s - max) / Σ exp(s - max); back, s̄_i = P_i (P̄_i - Σ_j P_j P̄_j).

    Sums are over the group, and autograd does not follow collectives. They are fp64, so that the order in which ranks
    add up does not show in fp32 weights.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, largest: float, group) -> Tensor:
        powers = torch.exp(scores.double() - largest)  # [b]
        weights = powers / _all_sum(powers.sum(), group)  # P [b]
        ctx.save_for_backward(weights)
        ctx.group, ctx.dtype = group, scores.dtype
        return weights.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        (weights,) = ctx.saved_tensors
        mean = _all_sum((weights * adjoint).sum(), ctx.group)  # Σ_j P_j P̄_j
        return (weights * (adjoint - mean)).to(ctx.dtype), None, None


def global_softmax(scores: Tensor, group=None, *, unit_ids: Tensor | None = None, micro_batch_size: int = 0) -> Tensor:
    """Weights P [b] of this rank's scores [b] (of all its micro-batches together); they add up to 1 over the group.

    Differentiable (once). All ranks of the group must call it; a rank may have no scores. When a score is not finite on
    any rank, every rank raises the same ValueError naming rank, micro-batch and unit ids.
    """
    largest = largest_score(scores, group, unit_ids=unit_ids, micro_batch_size=micro_batch_size)
    return _GlobalSoftmax.apply(scores, largest, group)


def _all_sum(value: Tensor, group) -> Tensor:
    """The sum of a scalar over the group, in place."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
