"""How large a bilevel step gets, and the largest micro-batch that stays under a limit.

Counted above what is held between two steps (parameters, optimiser states, z; of a control, too). A step has two peaks
in turn:

    the walk          b = grad Phi, the gradient of G and C z (three vectors as large as the proxy), head chunks, blocks
    the score model   its gradient twice (the sum, and a micro-batch's) and the graph of its ordinary backward pass

An estimate from shapes, the same on every machine. ``tools/benchmark.py memory`` holds it against measured peaks;
allocators may add their own on top. A control's gradient comes between the two, when the walk's vectors are gone, and
is smaller than the walk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_bliss.bilevel.head import chunk_size
from megatron_bliss.models.presets import Architecture, parameter_count, trunk_count
from megatron_bliss.models.score_architecture import ScoreArchitecture

GIB = 2**30
VECTORS = 3
"""Vectors in the proxy's parameter space that live at once during the walk, in the precision of sums."""
KEPT_BYTES = 512 * 2**20
"""Without a memory limit, blocks' graphs are kept for the way back when they take less than this on a CPU."""
KEPT_SHARE = 1 / 16
"""The same on a GPU: the share of its memory, where the target and its optimiser may lie beside the walk."""
BLOCK_FACTOR = 2
"""A block's backward pass holds adjoints beside the activations they belong to."""


@dataclass(frozen=True)
class StepPlan:
    """Samples at once, whether blocks are recomputed on the way back (None: kept where cheap), estimated bytes."""

    micro_batch_size: int
    recompute: bool | None
    estimated_bytes: int


def block_elements(arch: Architecture) -> int:
    """Elements that one block's graph keeps per token, for plain values; twice as many for dual ones."""
    ffn_tensors = 2 if arch.architecture == "gpt_neox" else 4
    return 5 * arch.hidden_size + 2 * arch.query_key_value_size + ffn_tensors * arch.ffn_hidden_size


def keeps_graph(arch: Architecture, tokens: int, x: Tensor, *, dual: bool, recompute: bool | None) -> bool:
    """Whether the blocks' graphs over ``tokens`` tokens are kept for the way back, for activations like ``x``.

    ``recompute`` None decides by their estimated size, so that the same step on the same device always does the same.
    """
    if recompute is not None:
        return not recompute
    total = torch.cuda.get_device_properties(x.device).total_memory if x.device.type == "cuda" else 0
    return graph_bytes(arch, tokens, x.element_size(), dual=dual) <= kept_bytes(total)


def graph_bytes(arch: Architecture, tokens: int, element_size: int, *, dual: bool) -> int:
    """Estimated size of all blocks' graphs over ``tokens`` tokens."""
    return (2 if dual else 1) * arch.num_layers * block_elements(arch) * tokens * element_size


def kept_bytes(device_memory: int) -> int:
    """Largest graphs that are kept without being asked for, on a GPU with so many bytes of memory (0: on a CPU)."""
    return max(KEPT_BYTES, int(device_memory * KEPT_SHARE))


@dataclass(frozen=True)
class StepShape:
    """What the size of a step follows from, but for the samples that are worked on at once."""

    arch: Architecture
    """Of the proxy."""
    seq_length: int
    element_size: int = 4
    """Bytes of a number in a pass."""
    device: str = "cpu"
    """cpu or cuda."""
    teacher: bool = False
    """Whether there is a KL term."""
    score: ScoreArchitecture | None = None
    """Parts of the score model; None: the proxy's trunk."""


def step_bytes(shape: StepShape, samples: int, *, recompute: bool) -> int:
    """Estimated peak of one upper step over ``samples`` at once."""
    walk = _walk_bytes(shape, samples, recompute=recompute, dual=True)
    score = shape.score or ScoreArchitecture(trunk=shape.arch)
    return max(walk, score_bytes(score, samples * shape.seq_length, shape.element_size))


def gradient_bytes(shape: StepShape, samples: int, *, recompute: bool) -> int:
    """The same of one ordinary gradient without KL, as in the proxy's warm-up or of the validation loss."""
    return _walk_bytes(replace(shape, teacher=False), samples, recompute=recompute, dual=False)


def planned_gradient_bytes(shape: StepShape, samples: int, recompute: bool | None, kept: int) -> int:
    """The same where graphs are kept while they take at most ``kept`` bytes, unless ``recompute`` says."""
    if recompute is None:
        recompute = graph_bytes(shape.arch, samples * shape.seq_length, shape.element_size, dual=False) > kept
    return gradient_bytes(shape, samples, recompute=recompute)


def _walk_bytes(shape: StepShape, samples: int, *, recompute: bool, dual: bool) -> int:
    arch, tokens = shape.arch, samples * shape.seq_length
    # buffers [chunk, v] of the head (head.py): probabilities and logits, with KL the teacher's and a scratch
    buffers, values, vectors = 4 if shape.teacher else 2, 1 + dual, VECTORS if dual else 1
    head = buffers * chunk_size(tokens, arch.vocab_size, torch.device(shape.device)) * arch.vocab_size * 4
    rows = 3 * values * tokens * arch.hidden_size  # hidden states at the head and their adjoints, with any tangents
    graph = block_elements(arch) * tokens
    inputs = values * arch.num_layers * arch.hidden_size * tokens
    blocks = inputs + values * BLOCK_FACTOR * graph if recompute else values * (arch.num_layers + 1) * graph
    # the head's chunks are gone when the walk back begins: the larger of the two counts
    return 4 * vectors * parameter_count(arch) + max(
        head + rows * shape.element_size, (rows + blocks) * shape.element_size
    )


def score_bytes(score: ScoreArchitecture, tokens: int, element_size: int) -> int:
    """The same of a gradient of the score model over ``tokens`` tokens at once."""
    arch, table = score.trunk, 4 * 2 * score.table_parameters + score.table_pass_bytes(tokens)
    if arch is None:
        return table
    graph = (arch.num_layers + 1) * block_elements(arch) * tokens * element_size
    return 4 * 2 * trunk_count(arch) + graph + table


def plan_step(shape: StepShape, samples: int, limit_gib: float) -> StepPlan:
    """The largest micro-batch of at most ``samples`` whose step is estimated to stay under ``limit_gib``.

    Prefers a larger micro-batch with recomputation to a smaller one without. Raises ValueError when a single sample is
    too large.
    """
    limit = int(limit_gib * GIB)

    def size(count: int, recompute: bool) -> int:
        return step_bytes(shape, count, recompute=recompute)

    fitting = [count for count in range(1, samples + 1) if size(count, True) <= limit]
    if not fitting:
        raise ValueError(
            f"found bilevel.memory_limit_gib {limit_gib}, expected at least {size(1, True) / GIB:.2f} for one sample "
            f"of {shape.seq_length} tokens: raise it, or take a smaller proxy or a shorter data.seq_length"
        )
    count = max(fitting)
    keep = size(count, False) <= limit
    return StepPlan(count, None if keep else True, size(count, not keep))
