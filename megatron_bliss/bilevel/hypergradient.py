"""From scores (1) and influences (6) to the gradient of the upper level by the score model's parameters (7).

(1) s_i = a(f(theta_s; xi_i)), the score model's output (models/score.py)
(7) grad Phi = - sum_i P_i (d_i - sum_j P_j d_j) grad s_i = sum_i c_i grad s_i,  c_i = - P_i (d_i - sum_j P_j d_j)

The sums run over the global batch. Other weights than the softmax have other coefficients (weights/). They do not
depend on theta_s once they are numbers, so (7) is one ordinary backward pass of a weighted sum of scores, and one
all-reduce.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.bilevel import vector
from megatron_bliss.bilevel.execution import ALONE, Execution
from megatron_bliss.bilevel.vector import ParameterVector, accumulation_dtype
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.score import ScoreModel


@torch.no_grad()
def score_batch(model: ScoreModel, batch: Batch, *, micro_batch_size: int = 0, raw: bool = False) -> Tensor:
    """(1) Scores s_i [b] of a batch without a graph, by micro-batches; ``raw``: f_i instead."""
    score = model.raw_scores if raw else model
    parts = [score(part.tokens, part.lengths) for _, part in batch.micro_batches(micro_batch_size)]
    first = next(model.parameters())
    empty = torch.zeros(0, dtype=accumulation_dtype(first.dtype), device=first.device)  # a rank may have no sample
    return torch.cat([empty, *parts])


@torch.no_grad()
def hypergradient_coefficients(weights: Tensor, influence: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """c_i = - P_i (d_i - sum_j P_j d_j) of (7), [b], from this rank's P and d [b]; the mean runs over the whole group.

    In fp64: the differences from the mean are small against the mean where a gradient is common to all samples.
    """
    weights, influence = weights.detach().double(), influence.detach().double()
    mean = (weights * influence).sum()
    if group is not None:
        dist.all_reduce(mean, group=group)
    return -weights * (influence - mean)


def hypergradient(
    model: ScoreModel, batch: Batch, coefficients: Tensor, execution: Execution = ALONE, *, raw: bool = False
) -> ParameterVector:
    """(7) grad Phi = sum_i c_i grad s_i by the score model's parameters, summed over the ranks; c [b].

    ``raw``: the c_i are those of raw scores, and f_i stands in the place of s_i.
    """
    if coefficients.shape != (len(batch),):
        raise ValueError(f"found coefficients of shape {tuple(coefficients.shape)}, expected ({len(batch)},)")
    parameters, total = dict(model.named_parameters()), vector.zeros(model)
    score = model.raw_scores if raw else model
    for rows, part in batch.micro_batches(execution.micro_batch_size):
        with torch.enable_grad():
            scores = score(part.tokens, part.lengths)  # [b]
        found = torch.autograd.grad(scores, list(parameters.values()), coefficients[rows].detach().to(scores.dtype))
        vector.add_by_name(total, parameters, found)
    execution.add_over_ranks(total.flat)
    return total
