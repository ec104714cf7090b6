"""The loss of a language model on units, one by one: a forward pass whose logits are made a chunk at a time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.arms.reading import score_by
from megatron_bliss.bilevel.head import chunk_size
from megatron_bliss.bilevel.memory import block_elements
from megatron_bliss.data.batches import Batch
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.target.memory import FP32_BYTES

NO_LOSS = -1.0
"""In the place of the loss of a unit of one token, which has no next one."""


def shard_losses(model: LanguageModel, inputs: Inputs, name: str) -> np.ndarray | None:
    """:func:`unit_losses` of the whole shard, float32 [units], on the main rank; each rank reads its part."""

    def losses(ids: np.ndarray) -> np.ndarray:
        size = inputs.micro_batch_size
        batches = (inputs.source.batch(ids[first : first + size]) for first in range(0, len(ids), size))
        return np.concatenate([unit_losses(model, batch.to(inputs.groups.device)).cpu().numpy() for batch in batches])

    return score_by(losses, inputs, inputs.folder / "blocks", name)


@torch.no_grad()
def unit_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy of every sample, fp32 [b], NO_LOSS where there is no next token.

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
            f"found losses of the proxy that are not finite for units {bad[:10]}, expected numbers: its warm-up "
            "diverged; lower proxy.warmup_optimizer.lr and use a new run folder"
        )
    return means.masked_fill(counts == 0, NO_LOSS)


def preferred(losses: np.ndarray, keep: str) -> np.ndarray:
    """Scores float32 [n] of losses [n]; units without a loss score as the lowest of the others.

    middle: minus the distance of a loss's rank from the median's, as a share of the shard; equal losses share a rank.
    """
    known = losses != NO_LOSS
    if not known.any():
        raise ValueError(
            "found only units of one token in the shard, expected longer ones: leave out the arm perplexity"
        )
    if keep == "middle":
        ordered = np.sort(losses[known])
        ranks = (np.searchsorted(ordered, losses) + np.searchsorted(ordered, losses, side="right") - 1) / 2
        values = -np.abs(ranks - (len(ordered) - 1) / 2) / len(ordered)
    else:
        values = losses if keep == "high" else -losses
    return np.where(known, values, values[known].min()).astype(np.float32)


def working_bytes(arch: Architecture, tokens: int, element_size: int, device: str) -> int:
    """Estimated peak of a forward pass above the weights: a block, or the hidden states and a chunk's logits."""
    rows = chunk_size(tokens, arch.vocab_size, torch.device(device))
    head = tokens * arch.hidden_size * element_size + rows * arch.vocab_size * (element_size + 2 * FP32_BYTES)
    return max(block_elements(arch) * tokens * element_size, head)
