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

NAMED = 8
"""Units named in an error message per rank."""


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
    detached = scores.detach()
    finite = torch.isfinite(detached)
    largest = detached.double()[finite].max() if bool(finite.any()) else detached.new_tensor(-torch.inf).double()
    summary = torch.stack((largest, (~finite).any().double()))  # [2]: one all-reduce for both
    if group is not None:
        dist.all_reduce(summary, op=dist.ReduceOp.MAX, group=group)
    largest, broken = summary.tolist()
    if broken:
        _raise_non_finite(detached, finite, group, unit_ids, micro_batch_size)
    return _GlobalSoftmax.apply(scores, largest, group)


def _all_sum(value: Tensor, group) -> Tensor:
    """The sum of a scalar over the group, in place."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def _raise_non_finite(scores: Tensor, finite: Tensor, group, unit_ids: Tensor | None, micro_batch_size: int) -> None:
    """Gather what is wrong everywhere, so that every rank raises the same text."""
    rank = dist.get_rank(group) if group is not None else 0
    size = micro_batch_size or max(len(scores), 1)
    bad = (~finite).nonzero().flatten().tolist()
    found = [_describe(rank, i, size, scores, unit_ids) for i in bad[:NAMED]]
    found += [f"rank {rank}: {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    reports = [found]
    if group is not None:
        reports = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, found, group=group)
    lines = "; ".join(line for report in reports for line in report)
    raise ValueError(
        f"found scores that are not finite ({lines}), expected finite numbers: look at these units' tokens, lower"
        " bilevel.score_optimizer.lr or clip_grad, or go back to an earlier checkpoint"
    )


def _describe(rank: int, index: int, size: int, scores: Tensor, unit_ids: Tensor | None) -> str:
    unit = "" if unit_ids is None else f" unit {int(unit_ids[index])}"
    return f"rank {rank} micro-batch {index // size} position {index % size}{unit}: {float(scores[index])}"
