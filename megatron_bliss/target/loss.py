"""The target's loss on labelled batches: exact, and the same number on every rank.

Shapes: b samples, s tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.base.parallel import Groups
from megatron_bliss.data.batches import Batch
from megatron_bliss.target.model import Target, forward_only


def evaluate_loss(target: Target, batches: Sequence[Batch], groups: Groups) -> float:
    """Collective: mean of -log p over the labelled tokens of all batches, which every rank brings; eq. (4)'s measure.

    Data-parallel replicas take turns by batch. Exact, and the same at every parallel layout but for rounding in a
    forward pass. ValueError where no token is labelled.
    """
    mine = list(batches)[groups.data_parallel_rank :: groups.data_parallel_size]
    total = label_losses(target, mine, groups)
    dist.all_reduce(total, group=groups.world_group)
    if not total[1]:
        raise ValueError("found no labelled token in the evaluation batches, expected at least one: check the test set")
    return (total[0] / total[1]).item()


def label_losses(target: Target, batches: Sequence[Batch], groups: Groups) -> Tensor:
    """[sum of -log p, count], fp64, over the labelled tokens of batches that a model-parallel group brings.

    Collective over that group; one of its ranks has the numbers, the others zeros: a sum over ranks is exact.
    """
    rows = max((len(batch) for batch in batches), default=0)
    width = max((batch.tokens.shape[1] for batch in batches), default=0)
    multiple = groups.tensor_model_parallel_size if target[0].config.sequence_parallel else 1
    width += -width % multiple
    micro_batches, masks = [], []
    for batch in batches:
        tokens, mask = batch.tokens, batch.label_mask
        if groups.pipeline_model_parallel_size > 1 or multiple > 1:  # one shape for all micro-batches of a pipeline
            tokens, mask = _pad(tokens, rows, width), _pad(mask, rows, width)
        micro_batches.append((tokens, tokens.roll(-1, 1)))
        masks.append(F.pad(mask[:, 1:], (0, 1)))

    def collect(losses: Tensor, index: int) -> tuple[float, float]:
        mask = masks[index].to(losses.device)
        return losses.double()[mask].sum().item(), float(mask.sum().item())

    parts = forward_only(target, micro_batches, collect, groups)
    counted = groups.is_last_pipeline_stage and groups.tensor_model_parallel_rank == 0
    sums = [math.fsum(part[i] for part in parts) if counted else 0.0 for i in (0, 1)]
    return torch.tensor(sums, dtype=torch.float64, device=groups.device)


def _pad(tensor: Tensor, rows: int, width: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[1], 0, rows - tensor.shape[0]))
