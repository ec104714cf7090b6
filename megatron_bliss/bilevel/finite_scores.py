"""No weight is made of scores that are not finite: the check of a global batch, with the same error on every rank.

Shapes: b the scores of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

NAMED = 8
"""Units named in an error message per rank."""


def largest_score(scores: Tensor, group=None, *, unit_ids: Tensor | None = None, micro_batch_size: int = 0) -> float:
    """The largest of the group's scores; collective, and a rank may have none [0].

    When a score is not finite on any rank, every rank raises the same ValueError naming rank, micro-batch and unit ids.
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
    return largest


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
