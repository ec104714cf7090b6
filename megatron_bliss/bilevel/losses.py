"""The loss of a language model on units, one by one: a forward pass whose logits are made a chunk at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.bilevel.head import chunk_size
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.transformer import LanguageModel

NO_LOSS = -1.0
"""In the place of the loss of a unit of one token, which has no next one."""


@torch.no_grad()
def unit_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of every sample over its labelled tokens, fp32 [b], NO_LOSS where there is none.

    FloatingPointError naming the units where one is not finite.
    """
    hidden_states, weight = model.hidden_states(batch.tokens), model.output_weight
    samples, columns = batch.label_mask.nonzero(as_tuple=True)
    losses = torch.zeros(batch.label_mask.shape, dtype=torch.float32, device=batch.tokens.device)
    rows = chunk_size(max(len(samples), 1), len(weight), batch.tokens.device)
    for part, places in zip(samples.split(rows), columns.split(rows), strict=True):
        logits = F.linear(hidden_states[part, places - 1], weight).float()
        losses[part, places] = F.cross_entropy(logits, batch.tokens[part, places], reduction="none")
    counts = batch.label_mask.sum(1)
    means = losses.sum(1) / counts.clamp(min=1)
    if not torch.isfinite(means).all():
        bad = batch.unit_ids[~torch.isfinite(means)].tolist()
        raise FloatingPointError(
            f"found losses of the proxy that are not finite for units {bad[:10]}, expected numbers: its training "
            "diverged; lower proxy.warmup_optimizer.lr (or bilevel.proxy_optimizer.lr) and use a new run folder"
        )
    return means.masked_fill(counts == 0, NO_LOSS)


@torch.no_grad()
def total_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """(Sum of cross-entropies of labelled tokens, their number), fp64 [2]; over ranks and batches they add up."""
    if not len(batch):
        return torch.zeros(2, dtype=torch.float64, device=batch.tokens.device)
    counts = batch.label_mask.sum(1)
    means = unit_losses(model, batch).masked_fill(counts == 0, 0.0).double()
    return torch.stack((means @ counts.double(), counts.sum().double()))
