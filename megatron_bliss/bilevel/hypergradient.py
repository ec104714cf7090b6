"""From influences to the gradient of the upper level by the score model's parameters (eq. 7).

(6) d_i = <grad l_i, z>
(7) grad Phi = - sum_i P_i (d_i - sum_j P_j d_j) grad s_i = sum_i c_i grad s_i,  c_i = - P_i (d_i - sum_j P_j d_j)

sums over the global batch: one ordinary backward pass of a sum of scores with constant coefficients, one all-reduce.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.bilevel.vector import ParameterVector, accumulation_dtype, parameter_total
from megatron_bliss.models.score import ScoreModel


@torch.no_grad()
def score_batch(model: ScoreModel, batch, *, micro_batch_size: int = 0) -> Tensor:
    """Scores [b] of a batch (eq. 1) without a graph, by micro-batches."""
    parts = [model(part.tokens, part.lengths) for part in _micro_batches(batch, micro_batch_size)]
    first = next(model.parameters())
    empty = torch.zeros(0, dtype=accumulation_dtype(first.dtype), device=first.device)
    return torch.cat([empty, *parts])


@torch.no_grad()
def hypergradient_coefficients(weights: Tensor, influence: Tensor, group=None) -> Tensor:
    """c [b] of eq. (7) from this rank's P [b] and d [b]; the mean of d runs over the whole group."""
    weights, influence = weights.detach().double(), influence.detach().double()
    mean = (weights * influence).sum()
    if group is not None:
        dist.all_reduce(mean, group=group)
    return -weights * (influence - mean)


def hypergradient(
    model: ScoreModel,
    batch,
    coefficients: Tensor,
    *,
    scores: Tensor | None = None,
    group=None,
    micro_batch_size: int = 0,
) -> ParameterVector:
    """grad Phi by the score model's parameters (eq. 7), summed over the group.

    ``scores`` [b] with their graph spare a forward pass; otherwise micro-batches are scored anew, one at a time.
    """
    if coefficients.shape != (len(batch),):
        raise ValueError(f"found coefficients of shape {tuple(coefficients.shape)}, expected ({len(batch)},)")
    parameters = dict(model.named_parameters())
    first = next(iter(parameters.values()))
    flat = torch.zeros(parameter_total(model), dtype=accumulation_dtype(first.dtype), device=first.device)
    total = ParameterVector(model, flat)
    if scores is not None:
        _add_gradient(total, parameters, scores, coefficients)
    else:
        start = 0
        for part in _micro_batches(batch, micro_batch_size):
            with torch.enable_grad():
                part_scores = model(part.tokens, part.lengths)
            _add_gradient(total, parameters, part_scores, coefficients[start : start + len(part)])
            start += len(part)
    if group is not None:
        dist.all_reduce(total.flat, group=group)
    return total


def _add_gradient(total: ParameterVector, parameters: dict, scores: Tensor, coefficients: Tensor) -> None:
    found = torch.autograd.grad(scores, list(parameters.values()), coefficients.detach().to(scores.dtype))
    for name, gradient in zip(parameters, found, strict=True):
        total[name].add_(gradient)


def _micro_batches(batch, size: int):
    size = size or max(len(batch), 1)
    return [batch.slice(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
