"""How large a bilevel step gets, and the largest micro-batch that stays under a limit.

Counted above what any such step must hold (parameters, optimiser states, z, the gradient and the product): activations,
block inputs, head chunks. An estimate from shapes, the same on every machine; allocators add their own on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bliss.bilevel.head import CHUNK_ELEMENTS
from megatron_bliss.models.presets import Architecture

GIB = 2**30
HEAD_BUFFERS = 4
"""Chunk buffers [tokens, vocabulary]: probabilities, tangents, the teacher's, one of scratch."""
BLOCK_FACTOR = 2
"""A block's backward pass holds adjoints beside the activations they belong to."""


@dataclass(frozen=True)
class StepPlan:
    """Samples at once, whether blocks are recomputed on the way back (None: kept where cheap), estimated bytes."""

    micro_batch_size: int
    recompute: bool | None
    estimated_bytes: int


def block_elements(arch: Architecture) -> int:
    """Elements that one block's graph keeps per token, for plain values."""
    ffn_tensors = 3 if arch.architecture == "gpt_neox" else 5
    return 5 * arch.hidden_size + 2 * arch.query_key_value_size + ffn_tensors * arch.ffn_hidden_size


def step_bytes(arch: Architecture, samples: int, seq_length: int, *, recompute: bool, element_size: int = 4) -> int:
    """Estimated peak of one upper step over ``samples`` x ``seq_length`` tokens at once.

    The largest of the walk (dual numbers) and the score model's backward pass (plain values, graph kept).
    """
    tokens = samples * seq_length
    head = HEAD_BUFFERS * min(CHUNK_ELEMENTS["cpu"], tokens * arch.vocab_size) * 4
    rows = 6 * tokens * arch.hidden_size  # hidden states at the head and their adjoints, each with a tangent
    graph = block_elements(arch) * tokens
    inputs = 2 * arch.num_layers * arch.hidden_size * tokens
    blocks = inputs + 2 * BLOCK_FACTOR * graph if recompute else 2 * (arch.num_layers + BLOCK_FACTOR) * graph
    score = (arch.num_layers + BLOCK_FACTOR) * graph
    return max(head + (rows + blocks) * element_size, score * element_size)


def plan_step(
    arch: Architecture, samples: int, seq_length: int, *, limit_gib: float, element_size: int = 4
) -> StepPlan:
    """The largest micro-batch of at most ``samples`` whose step is estimated to stay under ``limit_gib``.

    Prefers a larger micro-batch with recomputation to a smaller one without. Raises ValueError when a single sample is
    too large.
    """
    limit = int(limit_gib * GIB)

    def size(count: int, recompute: bool) -> int:
        return step_bytes(arch, count, seq_length, recompute=recompute, element_size=element_size)

    fitting = [count for count in range(1, samples + 1) if size(count, True) <= limit]
    if not fitting:
        raise ValueError(
            f"found bilevel.memory_limit_gib {limit_gib}, expected at least {size(1, True) / GIB:.2f} for one sample "
            f"of {seq_length} tokens: raise it, or take a smaller proxy or a shorter data.seq_length"
        )
    count = max(fitting)
    keep = size(count, False) <= limit
    return StepPlan(count, None if keep else True, size(count, not keep))
