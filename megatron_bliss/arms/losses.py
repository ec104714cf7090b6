"""The losses of a language model on all units of a shard, and scores that are made of them."""

from __future__ import annotations

import numpy as np
import torch

from megatron_bliss.arms.inputs import Inputs
from megatron_bliss.arms.reading import score_by
from megatron_bliss.bilevel.head import chunk_size
from megatron_bliss.bilevel.losses import NO_LOSS, unit_losses
from megatron_bliss.bilevel.memory import block_elements
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.target.memory import FP32_BYTES


def shard_losses(model: LanguageModel, inputs: Inputs, name: str) -> np.ndarray | None:
    """:func:`unit_losses` of the whole shard, float32 [units], on the main rank; each rank reads its part."""

    def losses(ids: np.ndarray) -> np.ndarray:
        size = inputs.micro_batch_size
        batches = (inputs.source.batch(ids[first : first + size]) for first in range(0, len(ids), size))
        return np.concatenate([unit_losses(model, batch.to(inputs.groups.device)).cpu().numpy() for batch in batches])

    return score_by(losses, inputs, inputs.folder / "blocks", name)


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
